"""The cases for loops over megatron-core's schedules; the processes are those of a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.cases import CASES, NEEDS
from contract.harness_megatron import MegatronHarness


@pytest.fixture(scope="module")
def harness() -> Iterator[MegatronHarness]:
    harness = MegatronHarness()
    yield harness
    harness.close()


@pytest.mark.parametrize("name", [n for n in CASES if NEEDS[n] <= MegatronHarness.can])
def test_case(harness: MegatronHarness, name: str, tmp_path: Path) -> None:
    CASES[name](harness, tmp_path)
