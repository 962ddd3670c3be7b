"""Sessions and micro-batches of the tests of `ChannelMetrics`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from channel_metrics import MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.session import ChannelMetrics
from channel_metrics.windows import Window

LOSS_AND_TOKENS = ("loss", "tokens")


def new(
    *channels: str, metrics: tuple[str, ...] = LOSS_AND_TOKENS, **options: Any
) -> ChannelMetrics:
    """Settings of the config, and arguments of the session; `on_window` is its own."""
    settings = {one.name for one in fields(MetricsConfig)} - {"on_window"}
    given = {key: options.pop(key) for key in list(options) if key in settings}
    return ChannelMetrics(MetricsConfig(channels=channels, metrics=metrics, **given), **options)


def batch(*counts: tuple[str | None, int, float], **more: Any) -> MicroBatch:
    """(channel, tokens, loss of each) per sequence."""
    losses = [loss for _, tokens, loss in counts for _ in range(tokens)]
    ends = torch.tensor([0, *(tokens for _, tokens, _ in counts)]).cumsum(0)
    return MicroBatch(
        token_losses=torch.tensor(losses),
        channels=[name for name, _, _ in counts],
        cu_seqlens=ends.int(),
        **more,
    )


def tokens(window: Window) -> dict[str, float]:
    return {name: values["tokens"] for name, values in window.values.items()}


class Seen(list[Window]):
    """An observer."""

    def __call__(self, window: Window) -> None:
        self.append(window)
