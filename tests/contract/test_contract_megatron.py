"""The cases for Megatron: its schedules, and ms-swift's trainer; in processes of a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from swift_tools import needs_swift

from contract.cases import CASES, NEEDS
from contract.harness_megatron import MegatronHarness
from contract.harness_swift_megatron import SwiftMegatronHarness

HARNESSES = {"megatron": MegatronHarness(), "swift_megatron": SwiftMegatronHarness()}
RUNS = [
    pytest.param(key, name, marks=needs_swift if key == "swift_megatron" else ())
    for key, harness in HARNESSES.items()
    for name in CASES
    if NEEDS[name] <= harness.can
]


@pytest.fixture(scope="module", autouse=True)
def servers() -> Iterator[None]:
    """They start with the first case, and end with the last."""
    yield
    for harness in HARNESSES.values():
        harness.close()


@pytest.mark.parametrize(("key", "name"), RUNS)
def test_case(key: str, name: str, tmp_path: Path) -> None:
    CASES[name](HARNESSES[key], tmp_path)
