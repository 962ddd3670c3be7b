"""Which mixin is for which trainer of LLaMA-Factory."""

from __future__ import annotations

from importlib import import_module

from channel_metrics.config import MetricsConfig
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ConfigError, UnsupportedVersionError
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.llamafactory.collator import RowsCollator
from channel_metrics.trainers.llamafactory.data import CHANNEL

__all__ = ["LlamaFactoryMixin", "mixin_for"]

# {class of a trainer: (module in this package, its mixin)}
_MIXINS = {
    "CustomSeq2SeqTrainer": ("mixins", "LlamaFactoryMixin"),
    "CustomTrainer": ("mixins", "LlamaFactoryMixin"),
    "CustomDPOTrainer": ("preference", "LlamaFactoryDPOMixin"),
    "CustomKTOTrainer": ("preference", "LlamaFactoryKTOMixin"),
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
    module, name = _MIXINS[names[0]]
    # Imported only here: preference needs TRL.
    found = getattr(import_module(f"channel_metrics.trainers.llamafactory.{module}"), name)
    mixin: type[ChannelMetricsMixin] = found
    return mixin


class LlamaFactoryMixin(ChannelMetricsMixin):
    """For stages sft and pt. The patch has put all channels into the column `channel`."""

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        super().start_channel_metrics(config.reading(CHANNEL))

    def _collator_kind(
        self, dataset: object, description: str, known: bool
    ) -> type[ChannelCollator]:
        if super()._collator_kind(dataset, description, known) is not ChannelCollator:
            raise ConfigError(
                "one process sends its batches to the others (dispatch_batches), or rows are cut "
                "along the sequence, but channel metrics need whole rows in LLaMA-Factory; set "
                "accelerator_config: {dispatch_batches: false}, or leave the patch out."
            )
        return RowsCollator
