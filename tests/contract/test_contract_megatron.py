"""The cases for Megatron: its schedules, and ms-swift's trainer; in processes of a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_cases import RanksOf
from swift_tools import needs_swift

from contract.cases_axes import CASES, NEEDS
from contract.harness_megatron import MegatronHarness
from contract.harness_swift_megatron import SwiftMegatronHarness

HARNESSES = {"megatron": MegatronHarness(), "swift_megatron": SwiftMegatronHarness()}
RUNS = [
    pytest.param(key, name, marks=needs_swift if key == "swift_megatron" else ())
    for key, harness in HARNESSES.items()
    for name in CASES
    if NEEDS[name] <= harness.can
]


@pytest.mark.parametrize(("key", "name"), RUNS)
def test_case(key: str, name: str, tmp_path: Path, ranks_of: RanksOf) -> None:
    harness = HARNESSES[key]
    harness.ranks_of = ranks_of
    CASES[name](harness, tmp_path)
