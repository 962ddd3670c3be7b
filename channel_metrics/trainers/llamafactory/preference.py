"""Channel metrics in LLaMA-Factory's stages dpo (orpo and simpo too) and kto."""

from __future__ import annotations

from typing import Any

import torch

from channel_metrics.core.schema import Schema
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.trainers.llamafactory.mixins import LlamaFactoryMixin
from channel_metrics.trainers.trl.collator import RecordCollator
from channel_metrics.trainers.trl.dpo import DPOChannelMetricsMixin
from channel_metrics.trainers.trl.kto import KTORecordsMixin
from channel_metrics.trainers.trl.records import RecordsMixin, not_called

__all__ = ["LlamaFactoryDPOMixin", "LlamaFactoryKTOMixin"]


class _PreferenceMixin(LlamaFactoryMixin, RecordsMixin):
    """One channel per record: a pair, or an answer."""

    def _collator_kind(self, *args: Any) -> type[ChannelCollator]:
        super()._collator_kind(*args)
        return RecordCollator


class LlamaFactoryDPOMixin(_PreferenceMixin):
    """For stage dpo: the losses and rewards that LLaMA-Factory computes for each pair."""

    _kept: tuple[torch.Tensor, ...] = ()

    def _schema(self) -> Schema:
        return DPOChannelMetricsMixin._schema

    def compute_preference_loss(self, *args: Any, **kwargs: Any) -> Any:
        """LLaMA-Factory's own; its losses and rewards [pairs] are kept."""
        theirs: Any = super()
        result = theirs.compute_preference_loss(*args, **kwargs)
        # Not copied: LLaMA-Factory adds the term of pref_ftx to these losses in place.
        self._kept = tuple(part.detach() for part in result)
        return result

    def _observed_batch(self, compute: Any, model: Any, batch: Any, *args: Any, **kw: Any) -> Any:
        session = self.channel_metrics
        assert session is not None
        taken = self._taken_channels(batch)
        result = compute(model, batch, *args, **kw)
        if not self._kept:
            raise not_called(self, "compute_preference_loss")
        (losses, chosen, rejected), self._kept = self._kept, ()
        values = {
            "samples": torch.ones_like(losses),
            "chosen": chosen,
            "rejected": rejected,
            "accuracies": (chosen > rejected).to(losses.dtype),
            "margins": chosen - rejected,
            "loss": losses,
            "loss_samples": torch.ones_like(losses),
        }
        theirs = result[0].detach()
        self._count_records(session, taken.channels, values, ours=losses.mean(), theirs=theirs)
        return result


class LlamaFactoryKTOMixin(_PreferenceMixin, KTORecordsMixin):
    """For stage kto."""

    channel_label_key = "kto_tags"
    ftx_gamma: float

    def _loss_is_mean(self) -> bool:
        # The term of pref_ftx belongs to no single answer.
        return self.ftx_gamma <= 1e-6
