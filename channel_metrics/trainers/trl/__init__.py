"""Channel metrics in TRL: SFT, DPO, KTO, reward models and GRPO. Keys and limits: docs/trl.md.

    trainer = DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
    attach(trainer)              # bbu_rewards/margins, bbu_rewards/accuracies, bbu_loss, ...

`attach` is that of transformers' Trainer. It finds the mixin for the class of the trainer. With
packing, and in trl 0.29 with Liger, SFTTrainer drops the channels in its constructor. Use the
mixin or the patch then:

    class MySFT(SFTChannelMetricsMixin, SFTTrainer): ...
"""

from __future__ import annotations

from channel_metrics.trainers.hf import attach, detach
from channel_metrics.trainers.trl.dpo import DPOChannelMetricsMixin
from channel_metrics.trainers.trl.grpo import GRPOChannelMetricsMixin
from channel_metrics.trainers.trl.kto import KTOChannelMetricsMixin
from channel_metrics.trainers.trl.mixins import mixin_for
from channel_metrics.trainers.trl.other import OtherChannelMetricsMixin
from channel_metrics.trainers.trl.reward import RewardChannelMetricsMixin
from channel_metrics.trainers.trl.sft import SFTChannelMetricsMixin

__all__ = [
    "DPOChannelMetricsMixin",
    "GRPOChannelMetricsMixin",
    "KTOChannelMetricsMixin",
    "OtherChannelMetricsMixin",
    "RewardChannelMetricsMixin",
    "SFTChannelMetricsMixin",
    "attach",
    "detach",
    "mixin_for",
]
