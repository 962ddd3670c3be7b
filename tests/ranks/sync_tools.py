"""What real gloo processes count, and how often they talk to each other for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from collectives import watched

from channel_metrics import ChannelLossAccumulator
from channel_metrics.core.schema import TOKENS

Window = list[tuple[list[str | None], list[float]]]  # micro-batches of (channels, losses)


def fill(accumulator: ChannelLossAccumulator, window: Window) -> None:
    for channels, losses in window:
        rows = torch.tensor(losses).view(-1, 1)
        correct = torch.tensor(losses).view(-1, 1) > 2
        accumulator.update(rows, channels=channels, correct=correct, weights=rows.nan_to_num() + 1)


def alone(windows: list[Window]) -> dict[str, float]:
    accumulator = ChannelLossAccumulator(metrics=TOKENS.window_metrics)
    for window in windows:
        fill(accumulator, window)
    return accumulator.compute()


class CountedCollectives:
    """Counts the calls of torch.distributed functions that talk to other ranks."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        for name, call in watched(self._count).items():
            setattr(dist, name, call)

    def _count(self, name: str, *_: Any, **__: Any) -> None:
        self.calls[name] += 1

    def take(self) -> dict[str, int]:
        taken, self.calls = dict(self.calls), Counter()
        return taken
