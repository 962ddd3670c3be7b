"""Channel metrics in `swift rlhf --rlhf_type kto`: single answers, desirable or not."""

from __future__ import annotations

from typing import Any

from channel_metrics.core.schema import Schema
from channel_metrics.trainers.swift.rlhf import SwiftRLHFMixin, not_called
from channel_metrics.trainers.trl.kto import KTO_SCHEMA, KTOLossMixin

__all__ = ["SwiftKTOMixin"]


class SwiftKTOMixin(KTOLossMixin, SwiftRLHFMixin):
    """For `swift rlhf --rlhf_type kto`. Its losses and rewards are those of TRL's `kto_loss`."""

    def _schema(self) -> Schema:
        return KTO_SCHEMA

    def _observed_batch(
        self, compute: Any, model: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        session, taken = self.channel_metrics, self._taken_channels(batch)
        assert session is not None
        result = compute(model, batch, *args, **kwargs)
        values = self._kept_answers(batch["label"])
        if values is None:
            raise not_called(self, "kto_loss")
        self._count_records(
            session,
            taken.channels,
            values,
            # The auxiliary loss of experts belongs to no answer.
            ours=None if self.aux_loss_enabled else values["loss"].nanmean(),
            theirs=result[0].detach(),
        )
        return result
