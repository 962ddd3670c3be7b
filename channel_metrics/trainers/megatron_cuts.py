"""The old name of `channel_metrics.trainers.megatron.cuts`."""

import warnings

from channel_metrics.trainers.megatron.cuts import follow_cuts, unfollow_cuts

__all__ = ["follow_cuts", "unfollow_cuts"]

warnings.warn(
    "channel_metrics.trainers.megatron_cuts is now channel_metrics.trainers.megatron.cuts; "
    "import it from there.",
    DeprecationWarning,
    stacklevel=2,
)
