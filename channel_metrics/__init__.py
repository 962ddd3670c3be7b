"""Exact per-dataset ("channel") training metrics: `bbu_loss`, `lvis_token_acc`, tokens, share.

>>> import torch
>>> from channel_metrics import ChannelLossAccumulator
>>> acc = ChannelLossAccumulator(["bbu", "rru"], metrics=["loss", "tokens"])
>>> losses = torch.tensor([1.0, 3.0, 5.0])
>>> bounds = torch.tensor([0, 2, 3], dtype=torch.int32)
>>> acc.update(losses, channels=["bbu", "rru"], cu_seqlens=bounds).compute()
{'bbu_loss': 2.0, 'bbu_tokens': 2.0, 'rru_loss': 5.0, 'rru_tokens': 1.0}
"""

from channel_metrics.config import MetricsConfig
from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.boundaries import Boundaries, boundaries_from_batch
from channel_metrics.core.keys import ChannelTable
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import (
    BoundaryError,
    ChannelError,
    ChannelMetricsError,
    ConfigError,
    UnsupportedVersionError,
)
from channel_metrics.ranks.sync import sync

__all__ = [
    "Boundaries",
    "BoundaryError",
    "ChannelCollator",
    "ChannelError",
    "ChannelLossAccumulator",
    "ChannelMetricsError",
    "ChannelTable",
    "ConfigError",
    "MetricsConfig",
    "UnsupportedVersionError",
    "boundaries_from_batch",
    "sync",
]

__version__ = "0.1.0"
