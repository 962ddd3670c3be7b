"""The mixins for LLaMA-Factory's trainers, and which trainer gets which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.schema import Schema
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ConfigError, UnsupportedVersionError
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.llamafactory.collator import RowsCollator
from channel_metrics.trainers.llamafactory.data import CHANNEL
from channel_metrics.trainers.trl.kto import KTORecordsMixin
from channel_metrics.trainers.trl.records import BatchRecordsMixin, Call
from channel_metrics.trainers.trl.samples import pair_schema, pair_values

__all__ = ["LlamaFactoryDPOMixin", "LlamaFactoryKTOMixin", "LlamaFactoryMixin", "mixin_for"]


class _OneFieldMixin(ChannelMetricsMixin):
    """The patch has put all channels into the column `channel`."""

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        super().start_channel_metrics(config.reading(CHANNEL))


class LlamaFactoryMixin(_OneFieldMixin):
    """For stages sft and pt."""

    def _collator_kind(self, dataset: Any, description: str, known: bool) -> type[ChannelCollator]:
        if super()._collator_kind(dataset, description, known) is not ChannelCollator:
            raise ConfigError(
                "one process sends its batches to the others (dispatch_batches), or rows are cut "
                "along the sequence, but channel metrics need whole rows in LLaMA-Factory; set "
                "accelerator_config: {dispatch_batches: false}, or leave the patch out."
            )
        return RowsCollator


class LlamaFactoryDPOMixin(_OneFieldMixin, BatchRecordsMixin):
    """For stage dpo (orpo and simpo too): LLaMA-Factory's own loss and rewards of each pair."""

    channel_loss = "compute_preference_loss"

    def _schema(self) -> Schema:
        return pair_schema()

    def _values(self, calls: Sequence[Call], batch: Any) -> dict[str, Tensor]:
        losses, chosen, rejected = calls[0].results
        return pair_values(chosen, rejected, losses)


class LlamaFactoryKTOMixin(_OneFieldMixin, KTORecordsMixin):
    """For stage kto."""

    channel_label_key = "kto_tags"
    ftx_gamma: float

    def _loss_is_mean(self) -> bool:
        # The term of pref_ftx belongs to no single answer.
        return self.ftx_gamma <= 1e-6


_MIXINS: dict[str, type[ChannelMetricsMixin]] = {
    "CustomSeq2SeqTrainer": LlamaFactoryMixin,
    "CustomTrainer": LlamaFactoryMixin,
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
