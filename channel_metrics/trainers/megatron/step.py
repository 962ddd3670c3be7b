"""Makes a forward step function of Megatron count the tokens of its loss.

    step = counting_forward_step(forward_step, metrics)      # forward_step(data_iterator, model)
    forward_backward_func(forward_step_func=step, ...)

The forward step must work like those of Megatron's own scripts. It takes one batch from the data
iterator. The batch has `channels`, or the `dataset_id` of a blend. The step returns
`partial(loss_func, loss_mask, ...)` with its output.

A validation loop that uses the same forward step needs a window of its own, see
`ChannelMetrics.evaluation`. Without one, losses that have no gradients are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.megatron.ids import BatchIds, Tap

__all__ = ["counting_forward_step", "counting_schedule", "loss_mask_of"]


def counting_forward_step(
    step: Callable[..., Any], metrics: MegatronChannelMetrics
) -> Callable[..., Any]:
    """Make a forward step whose loss function counts.

    With context parallelism, call `cuts.follow_cuts()` before the batch is cut.

    Args:
        step: the forward step, called as `step(data_iterator, model, ...)`.
        metrics: counts the tokens.

    Returns:
        A forward step with the same arguments and results as `step`.
    """

    @functools.wraps(step)
    def step_that_counts(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        is_cut = _context_parallel_size() > 1
        session = metrics.session
        batch = BatchIds(
            session.labels,
            session.guard,
            drop_dataset_id=is_cut,
            with_places=bool(session.token_axes.of_places),
        )
        metrics.watch(model)
        tapped = None if data_iterator is None else Tap(data_iterator, batch)
        with batch.active():
            output, loss_func = step(tapped, model, *args, **kwargs)
        if loss_func is None:
            return output, loss_func
        return output, _counting_loss_func(loss_func, batch, metrics)

    return step_that_counts


def counting_schedule(
    forward_backward: Callable[..., Any], metrics: MegatronChannelMetrics
) -> Callable[..., Any]:
    """Make a schedule of megatron-core that begins a step and counts in the loss functions.

    A schedule that runs again before the step has ended starts the counts of the step anew.

    Args:
        forward_backward: what `get_forward_backward_func()` of megatron-core returns.
        metrics: counts the tokens.

    Returns:
        A function with the same arguments and results as `forward_backward`.
    """

    @functools.wraps(forward_backward)
    def counting_forward_backward(*args: Any, **kwargs: Any) -> Any:
        session = metrics.session
        if session.evaluating:
            # The iteration before is over.
            session.end_step()
        if kwargs.get("collect_non_loss_data"):
            return forward_backward(*args, **kwargs)
        if session.evaluating:
            session.begin_step()
        elif torch.is_grad_enabled():
            # Megatron may run an iteration twice, to find faulty devices.
            metrics.begin_step()
        step = counting_forward_step(kwargs["forward_step_func"], metrics)
        return forward_backward(*args, **{**kwargs, "forward_step_func": step})

    return counting_forward_backward


def loss_mask_of(loss_func: Any) -> Tensor:
    """Find the loss mask that a forward step of Megatron has bound to its loss function.

    Args:
        loss_func: `partial(loss_func, loss_mask, ...)`. The mask may also be bound by its name.

    Raises:
        UnsupportedVersionError: no loss mask is bound.
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
    loss_func: Callable[..., Any], batch: BatchIds, metrics: MegatronChannelMetrics
) -> Callable[..., Any]:
    def counting_loss_func(losses: Any, *args: Any, **kwargs: Any) -> Any:
        counted = loss_func
        # A tensor-parallel rank without data has a copy of tokens that another rank counts.
        if batch.num_batches and metrics.session.measuring and _has_a_window(metrics):
            with metrics.session.guard.guarded():
                ids = _ids(batch)
                mask = loss_mask_of(loss_func)
                if batch.rows is not None and mask.numel() == batch.rows.numel():
                    # Megatron may have flattened the rows, but ids per row need them.
                    mask = mask.reshape(batch.rows)
                counted = metrics.count(
                    loss_func,
                    channels=ids,
                    loss_mask=mask,
                    cu_seqlens=None if batch.is_cut else batch.cu_seqlens,
                    # With one id per row or sequence, their number is already known.
                    sequences=None if ids.dim() == 1 else batch.sequences,
                    labels=batch.labels if metrics.session.with_targets else None,
                    num_crossings=batch.num_crossings,
                    places=batch.places,
                )
        return counted(losses, *args, **kwargs)

    return counting_loss_func


def _has_a_window(metrics: MegatronChannelMetrics) -> bool:
    """Whether the tokens are those of training, or of an evaluation that is open."""
    # Even with --freeze-all-layers, Megatron computes training losses with gradients enabled.
    if torch.is_grad_enabled() or metrics.session.evaluating:
        return True
    metrics.session.warn_once(
        "losses that are computed without gradients are not counted, because they are not those "
        "of training; open a window for them: `with metrics.session.evaluation(...)`."
    )
    return False


def _ids(batch: BatchIds) -> Tensor:
    if batch.ids is None:
        raise ChannelError(
            "the batch has neither channel_ids, channels nor dataset_id, so its channels are "
            "unknown; a data loader of your own (--dataloader-type external) must give int64 "
            "`channels`, one per row, in every batch."
        )
    if batch.num_batches != 1:
        raise ChannelError(
            f"the forward step took {batch.num_batches} batches from its data iterator; "
            "which one the losses are of cannot be told. Take one batch per forward step."
        )
    if _context_parallel_size() > 1 and not batch.is_cut:
        raise ChannelError(
            "the labels were cut for context parallelism, but not by megatron.core.utils."
            "get_batch_on_this_cp_rank (or its THD variants), so the channel ids could not "
            "follow; cut the batch with Megatron's function, or count in the script, with "
            "MegatronChannelMetrics.count."
        )
    return batch.ids


def _context_parallel_size() -> int:
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return 1
    return int(parallel_state.get_context_parallel_world_size())
