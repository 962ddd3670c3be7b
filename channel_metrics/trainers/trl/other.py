"""TRL trainers without an adapter of their own: supported if their batches have labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ChannelMetricsError, UnsupportedVersionError
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin

__all__ = ["OtherChannelMetricsMixin"]


class _LabelsCollator(ChannelCollator):
    """If the labels are missing, raises that error instead of its consequences."""

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        try:
            return super()._with_channels(collate, features)
        except ChannelMetricsError:
            batch = collate(features)
            if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
                raise
        found = ", ".join(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise UnsupportedVersionError(
            f"channel metrics need `labels` in the batch, but this trainer of TRL has {found}, and "
            "it has no adapter of its own; detach the metrics for this trainer."
        )


class OtherChannelMetricsMixin(ChannelMetricsMixin):
    """The Trainer's own mixin, for trainers whose batches hold `labels`."""

    def _collator_kind(self, dataset: Any, description: str, known: bool) -> type[ChannelCollator]:
        kind = super()._collator_kind(dataset, description, known)
        return _LabelsCollator if kind is ChannelCollator else kind
