"""Channel metrics in the transformers Trainer, and in trainers built on it.

    trainer = Trainer(model, args, train_dataset=mixture)
    attach(trainer)
    trainer.train()          # the logs hold bbu_loss, bbu_token_acc, bbu_tokens, bbu_share, ...

or `class MyTrainer(ChannelMetricsMixin, Trainer)`; `attach` gives an instance that same mixin.
Training is unchanged bit for bit: loss, gradients, random numbers, weights.
"""

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

# Who is built on the Trainer and has a mixin of its own: {package: module with `mixin_for`}.
_MIXINS = {
    "swift": "channel_metrics.trainers.swift.mixin",
    "trl": "channel_metrics.trainers.trl.mixins",
}


def attach(
    trainer: TrainerT, config: MetricsConfig | None = None, *, whole_script: bool = False
) -> TrainerT:
    """Give `trainer` channel metrics; the same object is returned. A second call replaces them.

    Args:
        trainer: has been made, and does not train yet.
        config: None takes the defaults.
        whole_script: for patches, which meet every trainer of a script. One whose batches have no
            labels of tokens is left alone, and so is one whose data has no channels. An error
            ends the metrics of this trainer with a warning, unless `on_error` is "raise".

    Raises:
        UnsupportedVersionError: this transformers lacks a method that the metrics need.
    """
    check_trainer(type(trainer))
    # To mypy, an object cannot change its class.
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
    """Undo `attach`; the trainer is of its own class again."""
    changed: Any = trainer
    changed.__class__ = original_class(type(trainer))
    for name in ("channel_metrics", "channel_scratch", "channel_whole_script"):
        vars(trainer).pop(name, None)
    trainer.pop_callback(LiveTable)
    return trainer


def _mixin_for(trainer_class: Any) -> type[ChannelMetricsMixin]:
    frameworks = {parent.__module__.split(".")[0] for parent in trainer_class.__mro__}
    for framework, module in _MIXINS.items():
        if framework in frameworks:
            # Only here: somebody who has no such framework needs none.
            found: type[ChannelMetricsMixin] = import_module(module).mixin_for(trainer_class)
            return found
    return ChannelMetricsMixin
