"""Logs of a session with labels of axes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from channel_metrics import ChannelMetrics, MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.names import joint_name

ALL = ("loss", "token_acc", "tokens", "share")
AXES: dict[str, Any] = {"domain": {"bbu": "target", "code/rust": "target"}, "lang": ()}
PLAIN = ("bbu", "rru", "lvis")
SLASHED = ("code/python", "code/rust", "web/de")


def history(
    channels: Sequence[str], *, steps: int = 12, metrics: Sequence[str] = ALL, **config: Any
) -> list[dict[str, Any]]:
    """The log of a session: tokens with a language, losses that fall, the exact loss of all."""
    rng = random.Random(0)
    session = ChannelMetrics(MetricsConfig(metrics=tuple(metrics), **config))
    entries = []
    for step in range(1, steps + 1):
        names, losses, ends = [], [], [0]
        for place, channel in enumerate(channels):
            # The last channel is missing from half of the steps.
            if step % 2 and channel == channels[-1]:
                continue
            for lang in ("en", "de"):
                size = rng.randint(1, 30)
                names.append(joint_name(channel, [("lang", lang)] if "axes" in config else []))
                losses += [2.0 + place + rng.random() - step / 100 for _ in range(size)]
                ends.append(len(losses))
        values = torch.tensor(losses, dtype=torch.float64)
        session.count(
            MicroBatch(
                token_losses=values,
                correct=values < 3,
                channels=names,
                cu_seqlens=torch.tensor(ends, dtype=torch.int32),
            )
        )
        logs = session.close(step).logs
        entries.append({"loss": float(values.mean()), **logs, "step": step})
    return entries
