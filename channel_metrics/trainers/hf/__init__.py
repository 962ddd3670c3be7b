"""Channel metrics in the transformers Trainer, and in trainers built on it.

    trainer = Trainer(model, args, train_dataset=mixture)
    attach(trainer)
    trainer.train()          # the logs hold bbu_loss, bbu_token_acc, bbu_tokens, bbu_share, ...

or `class MyTrainer(ChannelMetricsMixin, Trainer)`; `attach` gives an instance that same mixin.
Training is unchanged bit for bit: loss, gradients, random numbers, weights.
"""

from __future__ import annotations

from channel_metrics.trainers.hf.attaching import attach, detach
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin, check_trainer
from channel_metrics.trainers.hf.probe import DatasetMetricsCallback, attach_probe

__all__ = [
    "ChannelMetricsMixin",
    "DatasetMetricsCallback",
    "attach",
    "attach_probe",
    "check_trainer",
    "detach",
]
