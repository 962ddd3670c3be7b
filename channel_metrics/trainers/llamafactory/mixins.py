"""The mixins for LLaMA-Factory's trainers, and which trainer gets which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from channel_metrics.core.schema import Schema
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.hf.rows import NamesMixin, RowsMixin
from channel_metrics.trainers.trl.kto import KTORecordsMixin
from channel_metrics.trainers.trl.records import BatchRecordsMixin, Call
from channel_metrics.trainers.trl.samples import pair_schema, pair_values

__all__ = ["LlamaFactoryDPOMixin", "LlamaFactoryKTOMixin", "mixin_for"]


class LlamaFactoryDPOMixin(NamesMixin, BatchRecordsMixin):
    """For stage dpo (orpo and simpo too): LLaMA-Factory's own loss and rewards of each pair."""

    channel_loss = "compute_preference_loss"

    def _schema(self) -> Schema:
        return pair_schema()

    def _values(self, calls: Sequence[Call], batch: Any) -> dict[str, Tensor]:
        losses, chosen, rejected = calls[0].results
        return pair_values(chosen, rejected, losses)


class LlamaFactoryKTOMixin(NamesMixin, KTORecordsMixin):
    """For stage kto."""

    channel_label_key = "kto_tags"
    ftx_gamma: float

    def _loss_is_mean(self) -> bool:
        # The term of pref_ftx belongs to no single answer.
        return self.ftx_gamma <= 1e-6


_MIXINS: dict[str, type[ChannelMetricsMixin]] = {
    "CustomSeq2SeqTrainer": RowsMixin,
    "CustomTrainer": RowsMixin,
    "CustomDPOTrainer": LlamaFactoryDPOMixin,
    "CustomKTOTrainer": LlamaFactoryKTOMixin,
}


def mixin_for(trainer_class: type) -> type[ChannelMetricsMixin]:
    """The mixin for a trainer of LLaMA-Factory.

    Raises:
        UnsupportedVersionError: it is not that of stage sft, pt, dpo or kto.
    """
    names = [c.__name__ for c in trainer_class.__mro__ if c.__module__.startswith("llamafactory.")]
    if names[0] not in _MIXINS:
        raise UnsupportedVersionError(
            "channel metrics are for LLaMA-Factory's stages sft, pt, dpo and kto, but this run has "
            f"a {names[0]}; leave the patch out for this stage."
        )
    return _MIXINS[names[0]]
