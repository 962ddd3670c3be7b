"""The common part of the mixins for `swift rlhf`: one channel per record, not per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from channel_metrics.core.labels import channel_of
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.swift.data import CHANNEL_COLUMN, declare
from channel_metrics.trainers.trl.records import RecordsMixin

__all__ = ["SwiftRLHFMixin"]


class _RecordCollator(ChannelCollator):
    """One channel per record. The template makes two rows of a record, or parts of one row."""

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        # With packing, each feature is a list of records.
        packs = [feature if isinstance(feature, list) else [feature] for feature in features]
        names = [channel_of(record, self.fields, self.classes) for pack in packs for record in pack]
        batch = collate(features)
        batch["channels"] = self._ids_or_names(names)
        return batch


class SwiftRLHFMixin(RecordsMixin):
    """For the trainers of `swift rlhf` but GRPO's."""

    # What ms-swift's trainers have.
    args: Any
    template: Any

    def _declare(self, session: ChannelMetrics, dataset: Any, split: str) -> bool:
        return declare(session, dataset, split)

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        known = self._declare(session, dataset, description) or bool(session.config.channels)
        return _RecordCollator(
            self.data_collator,
            fields=(CHANNEL_COLUMN,),
            table=session.labels if known else None,
            strip=(),
            carry_faults=True,
            classes=session.classes,
        )
