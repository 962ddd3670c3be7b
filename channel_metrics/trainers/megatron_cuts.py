"""The old name of `channel_metrics.trainers.megatron.cuts`."""

import warnings

from channel_metrics.trainers.megatron.cuts import (
    MARK,
    follow_cuts,
    megatron_modules,
    replace_everywhere,
)

__all__ = ["MARK", "follow_cuts", "megatron_modules", "replace_everywhere"]

warnings.warn(
    "channel_metrics.trainers.megatron_cuts is now channel_metrics.trainers.megatron.cuts; "
    "import it from there.",
    DeprecationWarning,
    stacklevel=2,
)
