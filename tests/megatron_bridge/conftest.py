"""The fixtures of Megatron-LM's tests, with another launcher."""

from __future__ import annotations

import pytest
from megatron_lm.conftest import data, launcher

from megatron_bridge.launch import BridgeLauncher

__all__ = ["data", "launcher", "launcher_class"]


@pytest.fixture(scope="session")
def launcher_class() -> type[BridgeLauncher]:
    return BridgeLauncher
