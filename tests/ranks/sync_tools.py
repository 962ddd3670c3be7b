"""What real gloo processes count, and how often they talk to each other for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

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

    NAMES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier",
             "all_gather_into_tensor", "broadcast_object_list", "gather_object")  # fmt: skip

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        for name in self.NAMES:
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, int]:
        taken, self.calls = dict(self.calls), Counter()
        return taken
