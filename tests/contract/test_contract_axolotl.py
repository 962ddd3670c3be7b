"""Every case that Axolotl's trainer can do, see script.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from axolotl_tools import ONLY_HERE
from rank_cases import RanksOf

from contract.acting_cases import CASES, NEEDS
from contract.harness_axolotl import AxolotlHarness

pytestmark = ONLY_HERE


@pytest.fixture(scope="module")
def harness(ranks_of: RanksOf) -> AxolotlHarness:
    made = AxolotlHarness()
    made.ranks_of = ranks_of
    return made


@pytest.mark.parametrize("name", [name for name in CASES if NEEDS[name] <= AxolotlHarness.can])
def test_case(harness: AxolotlHarness, name: str, tmp_path: Path) -> None:
    CASES[name](harness, tmp_path)
