"""One launcher and one set of data for all tests of a pytest process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from megatron_lm.data import Data

from megatron_bridge.launch import BridgeLauncher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BridgeLauncher]:
    launcher = BridgeLauncher(tmp_path_factory.mktemp("bridge"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("bridge_data"))
