"""The old name of `channel_metrics.losses.linear`."""

import warnings

from channel_metrics.losses.linear import Backend, linear_cross_entropy

__all__ = ["Backend", "linear_cross_entropy"]

warnings.warn(
    "channel_metrics.linear_losses is now channel_metrics.losses.linear; import it from there.",
    DeprecationWarning,
    stacklevel=2,
)
