"""Every case that the trainers of LLaMA-Factory and Axolotl can do, see script.py.

Each has an environment of its own; in the others, its cases are skipped.
"""

from __future__ import annotations

from pathlib import Path

import axolotl_tools
import llamafactory_tools
import pytest
from rank_cases import RanksOf

from contract.acting_cases import CASES, NEEDS
from contract.harness import Forking
from contract.harness_axolotl import AxolotlHarness
from contract.harness_llamafactory import LlamaFactoryHarness

HARNESSES: list[tuple[Forking, pytest.MarkDecorator]] = [
    (AxolotlHarness(), axolotl_tools.ONLY_HERE),
    (LlamaFactoryHarness(), llamafactory_tools.ONLY_HERE),
]
RUNS = [
    pytest.param(harness, name, id=f"{harness.name}-{name}", marks=mark)
    for harness, mark in HARNESSES
    for name in CASES
    if NEEDS[name] <= harness.can
]


@pytest.mark.parametrize(("harness", "name"), RUNS)
def test_case(harness: Forking, name: str, tmp_path: Path, ranks_of: RanksOf) -> None:
    harness.ranks_of = ranks_of
    CASES[name](harness, tmp_path)
