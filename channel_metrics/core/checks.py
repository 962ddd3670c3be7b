"""Checks of the tensors of one micro-batch. Values are read only where that costs no sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from channel_metrics.core.cu_seqlens import can_read, check_cu_seqlens, check_cu_seqlens_type
from channel_metrics.core.extremes import ID_WORDS
from channel_metrics.core.masks import as_bool
from channel_metrics.core.sums import TokenValues
from channel_metrics.errors import ChannelError, ChannelMetricsError

__all__ = [
    "IGNORE_INDEX",
    "can_read",
    "channels_shape",
    "check_ids",
    "check_layout",
    "check_record_ids",
    "check_scalar",
    "checked_reference",
    "has_id_per_token",
    "token_values",
]

IGNORE_INDEX = -100
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def token_values(
    token_losses: Tensor,
    labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    correct: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
) -> TokenValues:
    """Check that the tensors fit each other, and find the supervised positions.

    A position is supervised if its label is not -100 and its loss_mask is not 0. Without labels
    and loss_mask, every position is supervised.

    Args:
        token_losses: float [T] or [B, S], nll in nats. All others have its shape.
        labels: integer token ids.
        loss_mask: 0 where not supervised.
        correct: bool, whether the target was predicted.
        weights, entropy: one per token.

    Raises:
        ChannelMetricsError: a tensor has the wrong type or shape.
    """
    came = getattr(token_losses, "dtype", type(token_losses).__name__)
    if came not in _FLOATS:
        raise ChannelMetricsError(
            f"token_losses must be a floating point tensor of nll in nats, but is {came}; pass "
            "float32, bfloat16, float16 or float64."
        )
    if token_losses.dim() not in (1, 2):
        raise ChannelMetricsError(
            "token_losses must have shape [num_tokens] or [batch, sequence], but has "
            f"{list(token_losses.shape)}; a reduced loss cannot be split into channels."
        )
    shape = token_losses.shape
    _check_shape("labels", labels, shape)
    _check_shape("loss_mask", loss_mask, shape)
    _check_shape("correct", correct, shape)
    _check_shape("weights", weights, shape)
    _check_shape("entropy", entropy, shape)
    if labels is not None and labels.is_floating_point():
        raise ChannelMetricsError(f"labels must be integer token ids, but is {labels.dtype}.")
    if correct is not None and correct.dtype != torch.bool:
        raise ChannelMetricsError(f"correct must be bool, but is {correct.dtype}.")
    correct = None if correct is None else as_bool(correct)
    mask = _mask(token_losses, labels, loss_mask)
    return TokenValues(token_losses, mask, correct, weights, targets=labels, entropy=entropy)


def check_ids(ids: Tensor, num_channels: int) -> None:
    """Raise `ChannelError` unless `ids` are integers from -1 to num_channels - 1.

    The range is checked on the host only.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ChannelError(f"channels must be int64 ids or a list of names, but is {ids.dtype}.")
    if not can_read(ids) or not ids.numel():
        return
    bounds = ids.aminmax()
    lowest, highest = int(bounds[0].item()), int(bounds[1].item())
    if highest >= num_channels or lowest < -1:
        raise ChannelError(
            f"channel ids must be -1 (unlabeled) or 0 to {num_channels - 1}, but range "
            f"from {lowest} to {highest}; ids and table are out of step."
        )


def channels_shape(channels: Tensor | Sequence[str | None]) -> torch.Size:
    """The shape of ids, or [N] for a list of names; raises `ChannelError` for a single string."""
    if isinstance(channels, str):
        raise ChannelError(
            f"channels must be one name per sequence, but is the string {channels!r}; pass a list."
        )
    return channels.shape if isinstance(channels, Tensor) else torch.Size([len(channels)])


def has_id_per_token(
    losses: torch.Size, ids: torch.Size, cu_seqlens: Tensor | None, *of_sequences: Tensor | None
) -> bool:
    """Whether there is one channel per token, as in shards of rows, and not one per sequence.

    One token with one id is a sequence, because [T] is one, unless the micro-batch has other
    sequences.

    Args:
        losses, ids: the shapes of token_losses and of the channels.
        cu_seqlens: the boundaries, if there are any.
        of_sequences: what has one row per sequence, or None.
    """
    others = any(given is not None and len(given) != 1 for given in of_sequences)
    return cu_seqlens is None and ids == losses and (ids != (1,) or others)


def check_record_ids(record_ids: Tensor | None, num_sequences: int) -> None:
    """Raise `ChannelError` unless there is one record id, in words, per sequence, or none."""
    if record_ids is None:
        return
    if list(record_ids.shape) != [num_sequences, ID_WORDS] or record_ids.dtype != torch.int64:
        raise ChannelError(
            f"record_ids must be int64 {[num_sequences, ID_WORDS]}, one row per sequence, but are "
            f"{record_ids.dtype} {list(record_ids.shape)}; see `core.extremes.id_words`."
        )


def checked_reference(reference: Tensor, num_sequences: int, device: torch.device) -> Tensor:
    """The numbers of a reference model, on `device`.

    Raises:
        ChannelError: they are not float64 [num_sequences, 2].
    """
    if list(reference.shape) != [num_sequences, 2] or reference.dtype != torch.float64:
        raise ChannelError(
            f"reference must be float64 [{num_sequences}, 2], nll and tokens of each sequence, but "
            f"is {reference.dtype} {list(reference.shape)}."
        )
    return reference.to(device, non_blocking=True)


def check_scalar(name: str, value: Tensor) -> None:
    """Raise `ChannelMetricsError` unless `value` is a tensor of one number."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ChannelMetricsError(
            f"{name} must be a tensor of one number, but is {came}; pass the sum before .item()."
        )


def check_layout(losses: Tensor, ids: torch.Size, cu_seqlens: Tensor | None) -> None:
    """Check that there is one channel per sequence.

    Args:
        losses: [T] or [B, S].
        ids: the shape of the channels.
        cu_seqlens: [N + 1], or None for one sequence per row.

    Raises:
        ChannelError: the number of channels is not that of the sequences.
        BoundaryError: cu_seqlens has a wrong type, or (on the host) wrong values.
    """
    if cu_seqlens is None:
        held = losses.shape[0] if losses.dim() == 2 else 1
        source = f"token_losses has shape {list(losses.shape)} and cu_seqlens is not given"
    else:
        check_cu_seqlens_type(cu_seqlens)
        if can_read(cu_seqlens):
            check_cu_seqlens(cu_seqlens, losses.numel())
        held = cu_seqlens.numel() - 1
        source = f"cu_seqlens has {held + 1} bounds"
    if tuple(ids) != (held,):
        came = f"{ids.numel()} entries" if len(ids) == 1 else f"shape {list(ids)}"
        raise ChannelError(
            f"channels has {came} but the batch holds {held} sequences ({source}); pass one "
            "channel per sequence."
        )


def _check_shape(name: str, value: Tensor | None, shape: torch.Size) -> None:
    if value is not None and not isinstance(value, Tensor):
        raise ChannelMetricsError(f"{name} must be a tensor, but is {type(value).__name__}.")
    if value is not None and value.shape != shape:
        raise ChannelMetricsError(
            f"{name} must have the shape of token_losses {list(shape)}, but has "
            f"{list(value.shape)}; shift and flatten both in the same way."
        )


def _mask(losses: Tensor, labels: Tensor | None, loss_mask: Tensor | None) -> Tensor:
    if loss_mask is not None:
        loss_mask = as_bool(loss_mask)
    if labels is None:
        return torch.ones_like(losses, dtype=torch.bool) if loss_mask is None else loss_mask
    mask = labels != IGNORE_INDEX
    return mask if loss_mask is None else mask & loss_mask
