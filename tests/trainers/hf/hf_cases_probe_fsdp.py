"""Probes on two ranks of FSDP2; see `hf_cases_fsdp` for how it comes to run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_case_tools import cases_of
from hf_cases_fsdp import FSDP2
from hf_cases_probe import _probed

WORLD_SIZE = 2
ENVIRON: dict[str, str] = {}


def fsdp2_off(folder: Path) -> Any:
    return _probed(folder, False, **FSDP2)


def fsdp2_on(folder: Path) -> Any:
    return _probed(folder, True, **FSDP2)


CASES = cases_of(globals())
