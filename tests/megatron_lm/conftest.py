"""One launcher and one set of data for all tests of a pytest process."""

from __future__ import annotations

import pytest
from rank_cases import RanksOf

from megatron_lm.data import Data
from megatron_lm.launch import Launcher


@pytest.fixture(scope="session")
def launcher_class() -> type[Launcher]:
    return Launcher


@pytest.fixture(scope="session")
def launcher(
    launcher_class: type[Launcher], tmp_path_factory: pytest.TempPathFactory, ranks_of: RanksOf
) -> Launcher:
    return launcher_class(tmp_path_factory.mktemp("megatron"), ranks_of)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("megatron_data"))
