"""The cases for Megatron: its schedules, and ms-swift's trainer; in processes of a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from swift_tools import needs_swift

from contract.cases import CASES, NEEDS
from contract.harness_megatron import MegatronHarness
from contract.harness_swift_megatron import SwiftMegatronHarness

HARNESSES = {MegatronHarness: (), SwiftMegatronHarness: (needs_swift,)}
RUNS = [
    pytest.param(kind, name, id=f"{kind.name}-{name}", marks=marks)
    for kind, marks in HARNESSES.items()
    for name in CASES
    if NEEDS[name] <= kind.can
]


@pytest.fixture(scope="module")
def harness(request: Any) -> Iterator[MegatronHarness]:
    harness = request.param()
    yield harness
    harness.close()


@pytest.mark.parametrize(("harness", "name"), RUNS, indirect=["harness"])
def test_case(harness: MegatronHarness, name: str, tmp_path: Path) -> None:
    CASES[name](harness, tmp_path)
