"""A forward step function of Megatron's, made to count the tokens of its loss.

    step = counting_forward_step(forward_step, metrics)      # forward_step(data_iterator, model)
    forward_backward_func(forward_step_func=step, ...)

For forward steps as Megatron's own scripts write them: one batch from the data iterator, with
`channels` (or a blend's `dataset_id`) in it, and `partial(loss_func, loss_mask, ...)` returned.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.megatron.ids import MicroBatch, Tap

__all__ = ["counting_forward_step", "loss_mask_of"]


def counting_forward_step(
    step: Callable[..., Any], metrics: MegatronChannelMetrics
) -> Callable[..., Any]:
    """`step(data_iterator, model, ...)`, whose loss function counts into `metrics`.

    With context parallelism, call `cuts.follow_cuts()` before the batch is cut.
    """

    @functools.wraps(step)
    def step_that_counts(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        is_cut = _context_parallel_size() > 1
        micro_batch = MicroBatch(metrics.table, metrics.guard, drop_dataset_id=is_cut)
        metrics.watch(model)
        tapped = None if data_iterator is None else Tap(data_iterator, micro_batch)
        with micro_batch.active():
            output, loss_func = step(tapped, model, *args, **kwargs)
        if loss_func is None:
            return output, loss_func
        return output, _counting_loss_func(loss_func, micro_batch, metrics)

    return step_that_counts


def loss_mask_of(loss_func: Any) -> Tensor:
    """The loss mask that Megatron's forward steps bind to their loss function.

    `partial(loss_func, loss_mask, ...)`, by position or by name; raises
    `UnsupportedVersionError` for anything else.
    """
    bound: Mapping[str, Any] = getattr(loss_func, "keywords", None) or {}
    positional = getattr(loss_func, "args", ())
    mask = bound.get("loss_mask", positional[0] if positional else None)
    if isinstance(mask, Tensor):
        return mask
    raise UnsupportedVersionError(
        "the forward step must return (output, partial(loss_func, loss_mask)), as Megatron's own "
        f"scripts do, but returned {loss_func!r}; count in the script, with "
        "MegatronChannelMetrics.count."
    )


def _counting_loss_func(
    loss_func: Callable[..., Any], micro_batch: MicroBatch, metrics: MegatronChannelMetrics
) -> Callable[..., Any]:
    def counting_loss_func(losses: Any, *args: Any, **kwargs: Any) -> Any:
        counted = loss_func
        # A tensor-parallel rank without data holds a copy of what another counts.
        if micro_batch.num_batches and metrics.guard.measuring:
            with metrics.guard.guarded():
                _warn_of_crossings(micro_batch, metrics)
                ids = _ids(micro_batch)
                counted = metrics.count(
                    loss_func,
                    channels=ids,
                    loss_mask=loss_mask_of(loss_func),
                    # Ids per row say themselves how many rows there are.
                    sequences=None if ids.dim() == 1 else micro_batch.sequences,
                )
        return counted(losses, *args, **kwargs)

    return counting_loss_func


def _ids(micro_batch: MicroBatch) -> Tensor:
    if micro_batch.ids is None:
        raise ChannelError(
            "the batch has neither channel_ids, channels nor dataset_id, so its channels are "
            "unknown; a data loader of your own (--dataloader-type external) must give int64 "
            "`channels`, one per row, in every batch."
        )
    if micro_batch.num_batches != 1:
        raise ChannelError(
            f"the forward step took {micro_batch.num_batches} batches from its data iterator; "
            "which one the losses are of cannot be told. Take one batch per forward step."
        )
    if _context_parallel_size() > 1 and not micro_batch.is_cut:
        raise ChannelError(
            "the labels were cut for context parallelism, but not by megatron.core.utils."
            "get_batch_on_this_cp_rank (or its THD variants), so the channel ids could not "
            "follow; cut the batch with Megatron's function, or count in the script, with "
            "MegatronChannelMetrics.count."
        )
    return micro_batch.ids


def _warn_of_crossings(micro_batch: MicroBatch, metrics: MegatronChannelMetrics) -> None:
    if micro_batch.num_crossings and not metrics.has_warned_of_crossings:
        metrics.has_warned_of_crossings = True
        warnings.warn(
            f"{micro_batch.num_crossings} supervised targets of this micro-batch are the first "
            "token of the next conversation of their pack; they count for the channel of that "
            "conversation. A prompt format that masks them avoids it.",
            stacklevel=2,
        )


def _context_parallel_size() -> int:
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return 1
    return int(parallel_state.get_context_parallel_world_size())
