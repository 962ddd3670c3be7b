"""The old name of `channel_metrics.trainers.megatron.step`."""

import warnings

from channel_metrics.trainers.megatron.step import counting_forward_step, loss_mask_of

__all__ = ["counting_forward_step", "loss_mask_of"]

warnings.warn(
    "channel_metrics.trainers.megatron_step is now channel_metrics.trainers.megatron.step; "
    "import it from there.",
    DeprecationWarning,
    stacklevel=2,
)
