"""Exact per-dataset ("channel") training metrics: `bbu_loss`, `lvis_token_acc`, tokens, share.

>>> import torch
>>> from channel_metrics import ChannelLossAccumulator
>>> acc = ChannelLossAccumulator(["bbu", "rru"], metrics=["loss", "tokens"])
>>> losses = torch.tensor([1.0, 3.0, 5.0])
>>> bounds = torch.tensor([0, 2, 3], dtype=torch.int32)
>>> acc.update(losses, channels=["bbu", "rru"], cu_seqlens=bounds).compute()
{'bbu_loss': 2.0, 'bbu_tokens': 2.0, 'rru_loss': 5.0, 'rru_tokens': 1.0}

A name is imported when it is first used: those who only read logs do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from channel_metrics.config import MetricsConfig
    from channel_metrics.core.accumulator import ChannelLossAccumulator
    from channel_metrics.core.boundaries import Boundaries, boundaries_from_batch
    from channel_metrics.core.keys import ChannelTable
    from channel_metrics.core.micro_batch import MicroBatch
    from channel_metrics.core.registry import Column, Metric
    from channel_metrics.core.schema import TOKENS
    from channel_metrics.data.collator import ChannelCollator
    from channel_metrics.data.mixed_stream import MixedStream
    from channel_metrics.errors import (
        BoundaryError,
        ChannelError,
        ChannelMetricsError,
        ConfigError,
        UnsupportedVersionError,
    )
    from channel_metrics.ranks.ranks import Ranks
    from channel_metrics.ranks.sync import sync
    from channel_metrics.session import ChannelMetrics
    from channel_metrics.trainers.loop import evaluate
    from channel_metrics.windows import Window

__all__ = [
    "TOKENS",
    "Boundaries",
    "BoundaryError",
    "ChannelCollator",
    "ChannelError",
    "ChannelLossAccumulator",
    "ChannelMetrics",
    "ChannelMetricsError",
    "ChannelTable",
    "Column",
    "ConfigError",
    "Metric",
    "MetricsConfig",
    "MicroBatch",
    "MixedStream",
    "Ranks",
    "UnsupportedVersionError",
    "Window",
    "boundaries_from_batch",
    "evaluate",
    "sync",
]

__version__ = "0.1.0"

# Where each name of `__all__` is: the same imports as above, for Python.
_MODULES = {
    "TOKENS": "core.schema",
    "Boundaries": "core.boundaries",
    "BoundaryError": "errors",
    "ChannelCollator": "data.collator",
    "ChannelError": "errors",
    "ChannelLossAccumulator": "core.accumulator",
    "ChannelMetrics": "session",
    "ChannelMetricsError": "errors",
    "ChannelTable": "core.keys",
    "Column": "core.registry",
    "ConfigError": "errors",
    "Metric": "core.registry",
    "MetricsConfig": "config",
    "MicroBatch": "core.micro_batch",
    "MixedStream": "data.mixed_stream",
    "Ranks": "ranks.ranks",
    "UnsupportedVersionError": "errors",
    "Window": "windows",
    "boundaries_from_batch": "core.boundaries",
    "evaluate": "trainers.loop",
    "sync": "ranks.sync",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    # The next use does not come here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
