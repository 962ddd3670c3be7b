"""Which mixin is for which trainer of TRL."""

from __future__ import annotations

import trl
from packaging.version import Version

from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.trl.dpo import DPOChannelMetricsMixin
from channel_metrics.trainers.trl.grpo import GRPOChannelMetricsMixin
from channel_metrics.trainers.trl.kto import KTOChannelMetricsMixin
from channel_metrics.trainers.trl.other import OtherChannelMetricsMixin
from channel_metrics.trainers.trl.reward import RewardChannelMetricsMixin
from channel_metrics.trainers.trl.sft import SFTChannelMetricsMixin

__all__ = ["mixin_for"]

_MIXINS: dict[str, type[ChannelMetricsMixin]] = {
    "DPOTrainer": DPOChannelMetricsMixin,
    "GRPOTrainer": GRPOChannelMetricsMixin,
    "KTOTrainer": KTOChannelMetricsMixin,
    "RewardTrainer": RewardChannelMetricsMixin,
    "SFTTrainer": SFTChannelMetricsMixin,
}
# Trainers that compute their loss or rewards in another way before this trl.
_OLDEST = {
    "DPOTrainer": "0.29",
    "GRPOTrainer": "0.29",
    "KTOTrainer": "0.29",
    "RewardTrainer": "0.24",
}


def mixin_for(trainer_class: type) -> type[ChannelMetricsMixin]:
    """The mixin for a trainer of TRL, or for a user's class built on one.

    A trainer that TRL itself derives from one of these has another loss. It gets the mixin of all
    other trainers, which needs labels.

    Raises:
        UnsupportedVersionError: this trl is too old for this trainer.
    """
    own = next(c for c in trainer_class.__mro__ if c.__module__.split(".")[0] == "trl")
    oldest = _OLDEST.get(own.__name__)
    if oldest is not None and Version(trl.__version__) < Version(oldest):
        raise UnsupportedVersionError(
            f"channel metrics of {own.__name__} need trl {oldest} or later, but {trl.__version__} "
            "is installed; update trl, or leave this trainer without metrics."
        )
    return _MIXINS.get(own.__name__, OtherChannelMetricsMixin)
