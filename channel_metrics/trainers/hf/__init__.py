"""Channel metrics in the transformers Trainer, and in trainers built on it.

    trainer = Trainer(model, args, train_dataset=mixture)
    attach(trainer)
    trainer.train()          # the logs hold bbu_loss, bbu_token_acc, bbu_tokens, bbu_share, ...

A class can have the metrics too: `class MyTrainer(ChannelMetricsMixin, Trainer)`. `attach` adds
the same mixin to one trainer object. Loss, gradients, random numbers and weights of the training
are the same with and without the metrics, to the last bit.
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
