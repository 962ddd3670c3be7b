"""The functions of megatron-core that cut batches for context parallelism, followed by the ids."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from channel_metrics.trainers.megatron.ids import follow_labels

__all__ = ["MARK", "follow_cuts", "megatron_modules", "replace_everywhere"]

# On a replacement, under this name, stands the original.
MARK = "_channel_metrics_original"
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
        if hasattr(utils, name) and not hasattr(getattr(utils, name), MARK):
            replace_everywhere(utils, name, follow_labels)


def replace_everywhere(
    module: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Put `wrap(original)` in the place of `module.name`, also where megatron imported it to."""
    original = getattr(module, name)
    replacement = functools.wraps(original)(wrap(original))
    setattr(replacement, MARK, original)
    for other in megatron_modules():
        if getattr(other, name, None) is original:
            setattr(other, name, replacement)


def megatron_modules() -> list[Any]:
    """All modules of megatron that are imported now."""
    return [m for n, m in list(sys.modules.items()) if n.split(".", 1)[0] == "megatron" and m]
