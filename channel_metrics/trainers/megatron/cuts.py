"""Patches for the functions of megatron-core that cut batches: they also cut the channel ids."""

from __future__ import annotations

from channel_metrics import swap
from channel_metrics.trainers.megatron.ids import follow_labels

__all__ = ["follow_cuts", "unfollow_cuts"]

_KEY = "megatron_cuts"
# Only some versions have the last two.
_CUTS = (
    "get_batch_on_this_cp_rank",
    "get_thd_batch_on_this_cp_rank",
    "get_batch_on_this_hybrid_cp_rank",
)


def follow_cuts() -> None:
    """Let the functions that cut labels for context parallelism also cut the channel ids.

    Call this before the training script imports these functions from megatron-core by name. A
    second call does nothing.
    """
    from megatron.core import utils

    for name in _CUTS:
        if hasattr(utils, name):
            swap.wrap(utils, name, follow_labels, key=_KEY, everywhere_in="megatron")


def unfollow_cuts() -> None:
    """Put Megatron's own functions back."""
    swap.unwrap(_KEY)
