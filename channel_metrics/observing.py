"""One forward of a transformers model, observed and counted: `ChannelMetrics.observe`."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.capture.transformers import is_causal
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.counting import Counting
from channel_metrics.data.collator import BOUNDS_KEY, CollatorFault
from channel_metrics.errors import ChannelError

__all__ = ["observe"]

# The reader of each session. It keeps what it learned about the model at the first batch.
_readers: WeakKeyDictionary[Counting, TokenLossReader] = WeakKeyDictionary()


@contextmanager
def observe(
    metrics: Counting,
    model: torch.nn.Module,
    batch: MutableMapping[str, Any],
    *,
    with_correct: bool,
) -> Iterator[None]:
    """See `ChannelMetrics.observe`."""
    channels, bounds = batch.pop("channels", None), batch.pop(BOUNDS_KEY, None)
    if not metrics.measuring:
        yield
        return
    new = TokenLossReader(with_correct=with_correct, guard=metrics.guard)
    reader = _readers.setdefault(metrics, new)
    with reader.observe(model) as observation:
        yield
    with metrics.guard.guarded():
        if isinstance(channels, CollatorFault):
            raise channels.error
        if channels is None or not isinstance(batch.get("labels"), Tensor):
            raise ChannelError(
                "a batch must hold `channels` and `labels` to be observed, but holds "
                f"{', '.join(batch)}; make it with `ChannelMetrics.collator`."
            )
        values, reported_sum = reader.read(
            observation, batch["labels"], causal=is_causal(model), by_rows=bounds is None
        )
        metrics.count(MicroBatch.of_values(values, channels, bounds, reported_sum))
