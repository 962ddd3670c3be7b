"""Patches for the functions of megatron-core that cut batches: they also cut the channel ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from channel_metrics import swap
from channel_metrics.core.places import Places
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.megatron.ids import current_ids
from channel_metrics.trainers.patching import announce, wrap_all

__all__ = ["follow_cuts", "follow_labels", "patch_loop", "unfollow_cuts", "unpatch_loop"]

# Entries that tell how to cut a batch, besides those whose keys start with cu_seqlens.
_HOW_TO_CUT = ("max_seqlen", "local_cp_size", "hybrid_cp_group")

_KEY = "megatron_cuts"
# The keys of the loops that are patched: they share the functions that cut.
_loops: set[str] = set()
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

    Raises:
        UnsupportedVersionError: this version of megatron-core lacks the first of them.
    """
    from megatron.core import __version__, utils

    names = [name for name in _CUTS if name == _CUTS[0] or hasattr(utils, name)]
    wrap_all(
        {(utils, name): follow_labels for name in names},
        key=_KEY,
        version=f"megatron-core {__version__}",
        remedy="update it to 0.13 or later",
        everywhere_in="megatron",
    )


def unfollow_cuts() -> None:
    """Put Megatron's own functions back."""
    swap.unwrap(_KEY)


def patch_loop(
    bodies: Mapping[tuple[Any, str], Any],
    *,
    key: str,
    version: str,
    remedy: str,
    package: str,
    again: bool = False,
) -> None:
    """Wrap functions of a training loop, and those that cut its batches; tell of it.

    A second call does nothing.

    Args:
        bodies, key, version, remedy: as in `wrap_all`.
        package: whose modules import the functions from each other.
        again: whether a second call replaces what the first has wrapped.

    Raises:
        UnsupportedVersionError: this version lacks a function. Then nothing is wrapped.
    """
    if again:
        unpatch_loop(key)
    if swap.is_applied(key):
        return
    try:
        follow_cuts()
        wrap_all(bodies, key=key, version=version, remedy=remedy, everywhere_in=package)
    except UnsupportedVersionError:
        unpatch_loop(key)
        raise
    _loops.add(key)
    announce(f"channel metrics: patched {version}")


def unpatch_loop(key: str) -> None:
    """Undo `patch_loop`."""
    swap.unwrap(key)
    _loops.discard(key)
    if not _loops:
        unfollow_cuts()


def follow_labels(cut: Callable[..., Any], batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Cut a batch for context parallelism, and the ids of the current micro-batch with it.

    Args:
        cut: Megatron's function. It returns the batch, or a tuple that starts with it.
        batch: the batch to cut.
        *args, **kwargs: the other arguments of `cut`.

    Returns:
        What `cut` returns.
    """
    now = current_ids()
    labels = batch.get("labels")
    if now is None or now.ids is None or labels is None:
        return cut(batch, *args, **kwargs)
    probes: list[dict[str, Any]] = []
    with now.guard.guarded():
        of_tokens = [now.of_tokens(labels.shape)]
        of_tokens += [one.reshape(labels.shape) for one in now.places or ()]
        for one in of_tokens:
            moved = one.to(labels.device, non_blocking=True)
            # Copied before the cut, because the cut changes the batch in place.
            probes.append({key: _probe_entry(key, value, moved) for key, value in batch.items()})
    result = cut(batch, *args, **kwargs)
    with now.guard.guarded():
        if probes:
            found = [result, *(cut(probe, *args, **kwargs) for probe in probes)]
            now.labels, now.ids, *places = [
                (one[0] if isinstance(one, tuple) else one)["labels"] for one in found
            ]
            now.places = Places(*places) if places else None
            now.is_cut = True
    return result


def _probe_entry(key: str, value: Any, ids: Tensor) -> Any:
    # Some functions take the length from the labels, others from the tokens.
    if key in ("labels", "tokens"):
        return None if value is None else ids
    return value if key.startswith("cu_seqlens") or key in _HOW_TO_CUT else None
