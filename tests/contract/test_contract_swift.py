"""Every case that ms-swift's trainers can do, see script.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rank_cases import RanksOf
from swift_tools import needs_swift

from contract.cases_axes import CASES, NEEDS
from contract.harness_swift import SwiftDPOHarness, SwiftHarness

pytestmark = needs_swift


KINDS = (SwiftHarness, SwiftDPOHarness)
RUNS = [
    pytest.param(kind, name, id=f"{kind.name}-{name}")
    for kind in KINDS
    for name in CASES
    if NEEDS[name] <= kind.can
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    SwiftHarness(folder).save_model()
    return folder


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_case(
    kind: type[SwiftHarness], name: str, model: Path, ranks_of: RanksOf, tmp_path: Path
) -> None:
    harness = kind(model)
    harness.ranks_of = ranks_of
    CASES[name](harness, tmp_path)


def test_ms_swift_is_not_imported_here() -> None:
    """No test file of this process may: it changes transformers for all the others."""
    assert "swift" not in sys.modules
