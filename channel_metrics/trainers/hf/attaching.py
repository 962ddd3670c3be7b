"""Channel metrics in the transformers Trainer, and in trainers built on it.

    trainer = Trainer(model, args, train_dataset=mixture)
    attach(trainer)
    trainer.train()          # the logs hold bbu_loss, bbu_token_acc, bbu_tokens, bbu_share, ...

or `class MyTrainer(ChannelMetricsMixin, Trainer)`; `attach` gives an instance that same mixin.
Training is unchanged bit for bit: loss, gradients, random numbers, weights.
"""

from __future__ import annotations

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


def attach(trainer: TrainerT, config: MetricsConfig | None = None) -> TrainerT:
    """Give `trainer` channel metrics; the same object is returned.

    A second call only replaces the config. Raises `UnsupportedVersionError` if this
    transformers lacks a method that the metrics need.
    """
    check_trainer(type(trainer))
    # To mypy, an object cannot change its class.
    changed: Any = trainer
    if not isinstance(trainer, ChannelMetricsMixin):
        changed.__class__ = with_mixin(type(trainer), _mixin_for(type(trainer)))
    changed.start_channel_metrics(config or MetricsConfig())
    return trainer


def detach(trainer: TrainerT) -> TrainerT:
    """Undo `attach`; the trainer is of its own class again."""
    changed: Any = trainer
    changed.__class__ = original_class(type(trainer))
    vars(trainer).pop("channel_metrics", None)
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
