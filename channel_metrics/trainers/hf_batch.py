"""The part of a Trainer's batch that is ours: taken out before the model sees it."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from channel_metrics.statistics import TokenValues
from channel_metrics.trainers.hf_data import BOUNDS_KEY

__all__ = ["BatchChannels", "first_sequences", "take_channels"]


@dataclass(frozen=True)
class BatchChannels:
    """channels: per sequence (ids or names), or ids per token of the shape of the labels.
    cu_seqlens: int32 [num_sequences + 1], None where every row is one sequence."""

    channels: Tensor | list[str | None]
    cu_seqlens: Tensor | None

    @property
    def num_sequences(self) -> int:
        """The number of sequences (of rows, for ids per token)."""
        return len(self.channels)


def take_channels(inputs: MutableMapping[str, Any]) -> BatchChannels | None:
    """Remove our keys from `inputs`; None if they are not there."""
    channels, cu_seqlens = inputs.pop("channels", None), inputs.pop(BOUNDS_KEY, None)
    return None if channels is None else BatchChannels(channels, cu_seqlens)


def first_sequences(
    batch: BatchChannels, values: TokenValues, count: int
) -> tuple[BatchChannels, TokenValues]:
    """Only the first `count` sequences of a micro-batch; nothing is read from the device."""
    channels = batch.channels[:count]
    if batch.cu_seqlens is None:
        return BatchChannels(channels, None), TokenValues(
            values.losses[:count],
            values.mask[:count],
            None if values.correct is None else values.correct[:count],
            None if values.weights is None else values.weights[:count],
        )
    bounds = batch.cu_seqlens[: count + 1]
    positions = torch.arange(values.mask.numel(), device=values.mask.device)
    inside = (positions < bounds[-1].to(positions.device)).view(values.mask.shape)
    kept = TokenValues(values.losses, values.mask & inside, values.correct, values.weights)
    return BatchChannels(channels, bounds), kept
