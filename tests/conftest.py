"""Settings that every test needs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from rank_cases import RanksOf

settings.register_profile("local", deadline=None, max_examples=60)
settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# The tensors here are tiny: more threads only cost time, and CI has few cores.
torch.set_num_threads(1)


# Imports leave little garbage. To look for it takes a quarter of the collection of tests.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """accelerate collects garbage after each training; that must not look at all imports again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RanksOf]:
    """What a case returned on each of its ranks; see `rank_cases`."""
    ranks_of = RanksOf(tmp_path_factory.mktemp("ranks"))
    yield ranks_of
    ranks_of.close()
