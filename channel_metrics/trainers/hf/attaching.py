"""`attach` and `detach`: channel metrics for a trainer object that has already been made."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any, TypeVar

import transformers

from channel_metrics.config import MetricsConfig
from channel_metrics.observers.live_table import LiveTable
from channel_metrics.swap import original_class, with_mixin
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin, check_trainer

__all__ = ["ChannelMetricsMixin", "attach", "check_trainer", "detach"]

TrainerT = TypeVar("TrainerT", bound=transformers.Trainer)

# Frameworks whose trainers extend the Trainer and need their own mixin: {package: module}.
_MIXINS = {
    # These two before trl: their trainers for preferences are built on those of TRL.
    "axolotl": "channel_metrics.trainers.axolotl.mixins",
    "llamafactory": "channel_metrics.trainers.llamafactory.mixins",
    "swift": "channel_metrics.trainers.swift.tasks",
    "trl": "channel_metrics.trainers.trl.mixins",
}


def attach(
    trainer: TrainerT, config: MetricsConfig | None = None, *, whole_script: bool = False
) -> TrainerT:
    """Give `trainer` channel metrics. A second call replaces them by new ones.

    Args:
        trainer: a trainer whose training has not started yet.
        config: None means the default config.
        whole_script: True for patches, which attach the metrics to every trainer of a script. Then
            nothing is logged for a trainer whose batches have no labels of tokens, or whose data
            has no channels. If `on_error` is not set, an error ends only the metrics of this
            trainer, with a warning.

    Returns:
        `trainer` itself, whose class now has the mixin.

    Raises:
        UnsupportedVersionError: this version of transformers lacks a method that is needed.
    """
    check_trainer(type(trainer))
    # mypy does not know that an object can change its class.
    changed: Any = trainer
    if not isinstance(trainer, ChannelMetricsMixin):
        changed.__class__ = with_mixin(type(trainer), _mixin_for(type(trainer)))
    config = config or MetricsConfig()
    if whole_script and config.on_error is None:
        config = replace(config, on_error="warn")
    changed.channel_whole_script = whole_script
    changed.start_channel_metrics(config)
    return trainer


def detach(trainer: TrainerT) -> TrainerT:
    """Undo `attach`.

    Args:
        trainer: a trainer that `attach` was called for.

    Returns:
        `trainer` itself, with its original class.
    """
    changed: Any = trainer
    changed.__class__ = original_class(type(trainer))
    own = ("channel_metrics", "channel_scratch", "channel_whole_script")
    # Loaders that transformers keeps for persistent workers have our collator.
    for name in (*own, "_eval_dataloaders"):
        vars(trainer).pop(name, None)
    trainer.pop_callback(LiveTable)
    return trainer


def _mixin_for(trainer_class: Any) -> type[ChannelMetricsMixin]:
    frameworks = {parent.__module__.split(".")[0] for parent in trainer_class.__mro__}
    for framework, module in _MIXINS.items():
        if framework in frameworks:
            # Imported only here, so that nobody needs a framework that they do not use.
            found: type[ChannelMetricsMixin] = import_module(module).mixin_for(trainer_class)
            return found
    return ChannelMetricsMixin
