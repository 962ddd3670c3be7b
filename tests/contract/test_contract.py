"""Every case with every trainer that can do it, see script.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning_tools import quiet
from rank_cases import RanksOf

from contract.acting_cases import CASES, NEEDS
from contract.harness import Forking
from contract.harness_hf import HFHarness
from contract.harness_lightning import LightningHarness
from contract.harness_loop import LoopHarness
from contract.harness_megatron import MegatronHarness
from contract.harness_trl import DPOHarness, KTOHarness, RewardHarness, SFTHarness
from contract.harness_trl_grpo import GRPOHarness

# trl 1.16 reads a property that transformers 5.23 has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated"),
    # trl 0.29 says where they are defined.
    pytest.mark.filterwarnings("ignore:The `KTO.*` is now located in:FutureWarning"),
    *quiet,
]

HARNESSES: list[Forking] = [
    LoopHarness(),
    HFHarness(),
    LightningHarness(),
    SFTHarness(),
    DPOHarness(),
    RewardHarness(),
    KTOHarness(),
    GRPOHarness(),
]
RUNS = [
    pytest.param(harness, name, id=f"{harness.name}-{name}")
    for harness in HARNESSES
    for name in CASES
    if NEEDS[name] <= harness.can
]


@pytest.mark.parametrize(("harness", "name"), RUNS)
def test_case(harness: Forking, name: str, tmp_path: Path, ranks_of: RanksOf) -> None:
    harness.ranks_of = ranks_of
    CASES[name](harness, tmp_path)


def test_every_case_is_run_by_somebody() -> None:
    # Those of Megatron are in a file of their own.
    able = MegatronHarness.can.union(*(harness.can for harness in HARNESSES))
    assert frozenset().union(*NEEDS.values()) <= able
