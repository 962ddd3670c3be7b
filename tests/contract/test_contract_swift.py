"""Every case that ms-swift's trainer can do, see script.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rank_cases import RanksOf
from swift_tools import needs_swift

from contract.cases import CASES, NEEDS
from contract.harness_swift import SwiftHarness

pytestmark = needs_swift


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory, ranks_of: RanksOf) -> SwiftHarness:
    made = SwiftHarness(tmp_path_factory.mktemp("model"))
    made.ranks_of = ranks_of
    made.save_model()
    return made


@pytest.mark.parametrize("name", [name for name in CASES if NEEDS[name] <= SwiftHarness.can])
def test_case(harness: SwiftHarness, name: str, tmp_path: Path) -> None:
    CASES[name](harness, tmp_path)


def test_ms_swift_is_not_imported_here() -> None:
    """No test file of this process may: it changes transformers for all the others."""
    assert "swift" not in sys.modules
