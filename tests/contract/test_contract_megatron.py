"""The cases for Megatron: its schedules, Megatron-Bridge, and ms-swift's trainer; in processes of
a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron_bridge.launch import needs_megatron_bridge
from rank_cases import RanksOf
from swift_tools import needs_swift

from contract.acting_cases import CASES, NEEDS
from contract.harness_megatron import MegatronHarness
from contract.harness_megatron_bridge import MegatronBridgeHarness
from contract.harness_swift_megatron import SwiftMegatronHarness

HARNESSES = {
    "megatron": MegatronHarness(),
    "megatron_bridge": MegatronBridgeHarness(),
    "swift_megatron": SwiftMegatronHarness(),
}
MARKS = {"megatron_bridge": needs_megatron_bridge, "swift_megatron": needs_swift}
RUNS = [
    pytest.param(key, name, marks=MARKS.get(key, ()))
    for key, harness in HARNESSES.items()
    for name in CASES
    if NEEDS[name] <= harness.can
]


@pytest.mark.parametrize(("key", "name"), RUNS)
def test_case(key: str, name: str, tmp_path: Path, ranks_of: RanksOf) -> None:
    harness = HARNESSES[key]
    harness.ranks_of = ranks_of
    CASES[name](harness, tmp_path)
