"""Channel metrics in `swift rlhf --rlhf_type kto`."""

from __future__ import annotations

from channel_metrics.trainers.swift.rlhf import SwiftRLHFMixin
from channel_metrics.trainers.trl.kto import KTORecordsMixin

__all__ = ["SwiftKTOMixin"]


class SwiftKTOMixin(KTORecordsMixin, SwiftRLHFMixin):
    """For `swift rlhf --rlhf_type kto`."""

    def _loss_is_mean(self) -> bool:
        # The auxiliary loss of experts belongs to no answer.
        return not self.aux_loss_enabled
