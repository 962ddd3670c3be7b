"""Probes on two ranks of DeepSpeed; see `hf_cases_deepspeed` for how it comes to run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_case_tools import cases_of
from hf_cases_deepspeed import _config
from hf_cases_probe import _probed

WORLD_SIZE = 2
ENVIRON: dict[str, str] = {}


def _zero3(folder: Path, probe_on: bool) -> Any:
    config = _config(3)
    # The oracle asks for the whole weights.
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return _probed(folder, probe_on, use_cpu=False, ddp_backend=None, deepspeed=config)


def zero3_off(folder: Path) -> Any:
    return _zero3(folder, False)


def zero3_on(folder: Path) -> Any:
    return _zero3(folder, True)


CASES = cases_of(globals())
