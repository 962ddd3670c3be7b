"""Every case that ms-swift's trainers can do, see script.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rank_cases import RanksOf
from swift_tools import needs_swift

from contract.acting_cases import CASES, NEEDS
from contract.harness_swift import (
    SwiftCPOHarness,
    SwiftDPOHarness,
    SwiftGRPOHarness,
    SwiftHarness,
    SwiftKTOHarness,
    SwiftORPOHarness,
    SwiftRewardHarness,
)

pytestmark = needs_swift


KINDS = (
    SwiftHarness,
    SwiftDPOHarness,
    SwiftORPOHarness,
    SwiftCPOHarness,
    SwiftRewardHarness,
    SwiftKTOHarness,
    SwiftGRPOHarness,
)
RUNS = [
    pytest.param(kind, name, id=f"{kind.name}-{name}")
    for kind in KINDS
    for name in CASES
    if NEEDS[name] <= kind.can
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    SwiftHarness(folder).save_models()
    return folder


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_case(
    kind: type[SwiftHarness], name: str, models: Path, ranks_of: RanksOf, tmp_path: Path
) -> None:
    harness = kind(models)
    harness.ranks_of = ranks_of
    CASES[name](harness, tmp_path)


def test_ms_swift_is_not_imported_here() -> None:
    """No test file of this process may: it changes transformers for all the others."""
    assert "swift" not in sys.modules
