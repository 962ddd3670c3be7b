"""The common part of the mixins for `swift rlhf`: one channel per record, not per row."""

from __future__ import annotations

from typing import Any

from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.swift.data import declare, wrapped_collator
from channel_metrics.trainers.trl.collator import RecordCollator
from channel_metrics.trainers.trl.records import RecordsMixin

__all__ = ["SwiftRLHFMixin"]


class SwiftRLHFMixin(RecordsMixin):
    """For the trainers of `swift rlhf` but GRPO's."""

    # What ms-swift's trainers have.
    args: Any
    template: Any

    def _declare(self, session: ChannelMetrics, dataset: Any, split: str) -> bool:
        return declare(session, dataset, split)

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        self._declare(session, dataset, description)
        return wrapped_collator(session, self.data_collator, RecordCollator)
