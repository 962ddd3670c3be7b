"""The functions of megatron-core that cut batches for context parallelism, followed by the ids."""

from __future__ import annotations

from channel_metrics import swap
from channel_metrics.trainers.megatron.ids import follow_labels

__all__ = ["follow_cuts", "unfollow_cuts"]

_KEY = "megatron_cuts"
# Only some versions have the latter two.
_CUTS = (
    "get_batch_on_this_cp_rank",
    "get_thd_batch_on_this_cp_rank",
    "get_batch_on_this_hybrid_cp_rank",
)


def follow_cuts() -> None:
    """From now on the ids of a micro-batch are cut as its labels are; a second call does nothing.

    Call it before the training script imports these functions from megatron-core by name.
    """
    from megatron.core import utils

    for name in _CUTS:
        if hasattr(utils, name):
            swap.wrap(utils, name, follow_labels, key=_KEY, everywhere_in="megatron")


def unfollow_cuts() -> None:
    """Put Megatron's own functions back."""
    swap.unwrap(_KEY)
