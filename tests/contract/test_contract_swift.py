"""Every case that ms-swift's trainer can do, see script.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_client import Server
from swift_tools import SWIFT, needs_swift

from contract.cases import CASES, NEEDS
from contract.harness_swift import SwiftHarness

pytestmark = needs_swift


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftHarness]:
    server = Server(SWIFT, tmp_path_factory.mktemp("server"))
    made = SwiftHarness(tmp_path_factory.mktemp("model"), server)
    made.save_model()
    yield made
    server.close()


@pytest.mark.parametrize("name", [name for name in CASES if NEEDS[name] <= SwiftHarness.can])
def test_case(harness: SwiftHarness, name: str, tmp_path: Path) -> None:
    CASES[name](harness, tmp_path)


def test_ms_swift_is_not_imported_here() -> None:
    """No test file of this process may: it changes transformers for all the others."""
    assert "swift" not in sys.modules
