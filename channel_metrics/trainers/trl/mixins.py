"""Which mixin is for which trainer of TRL."""

from __future__ import annotations

from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.trl.dpo import DPOChannelMetricsMixin
from channel_metrics.trainers.trl.grpo import GRPOChannelMetricsMixin
from channel_metrics.trainers.trl.other import OtherChannelMetricsMixin
from channel_metrics.trainers.trl.reward import RewardChannelMetricsMixin
from channel_metrics.trainers.trl.sft import SFTChannelMetricsMixin

__all__ = ["mixin_for"]

_MIXINS: dict[str, type[ChannelMetricsMixin]] = {
    "DPOTrainer": DPOChannelMetricsMixin,
    "GRPOTrainer": GRPOChannelMetricsMixin,
    "RewardTrainer": RewardChannelMetricsMixin,
    "SFTTrainer": SFTChannelMetricsMixin,
}


def mixin_for(trainer_class: type) -> type[ChannelMetricsMixin]:
    """The mixin for a trainer of TRL, or for a user's class built on one.

    A trainer that TRL itself derives from one of these has another loss. It gets the mixin of all
    other trainers, which needs labels.
    """
    own = next(c for c in trainer_class.__mro__ if c.__module__.split(".")[0] == "trl")
    return _MIXINS.get(own.__name__, OtherChannelMetricsMixin)
