"""Checks of the tensors of one micro-batch; values are looked at only where that is free."""

from __future__ import annotations

import torch
from torch import Tensor

from channel_metrics.core.cu_seqlens import can_read, check_cu_seqlens, check_cu_seqlens_type
from channel_metrics.core.sums import TokenValues
from channel_metrics.errors import ChannelError, ChannelMetricsError

__all__ = ["IGNORE_INDEX", "can_read", "check_ids", "check_layout", "token_values"]

IGNORE_INDEX = -100


def token_values(
    token_losses: Tensor,
    labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    correct: Tensor | None = None,
    weights: Tensor | None = None,
) -> TokenValues:
    """Check that the tensors fit each other, and find the supervised positions.

    A position is supervised when its label is not -100 and its loss_mask is not 0; without
    either of them, every position is.
    """
    if not isinstance(token_losses, Tensor) or not token_losses.is_floating_point():
        came = getattr(token_losses, "dtype", type(token_losses).__name__)
        raise ChannelMetricsError(
            f"token_losses must be a floating point tensor of nll in nats, but is {came}."
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
    if labels is not None and labels.is_floating_point():
        raise ChannelMetricsError(f"labels must be integer token ids, but is {labels.dtype}.")
    if correct is not None and correct.dtype != torch.bool:
        raise ChannelMetricsError(f"correct must be bool, but is {correct.dtype}.")
    return TokenValues(token_losses, _mask(token_losses, labels, loss_mask), correct, weights)


def check_ids(ids: Tensor, num_channels: int) -> None:
    """Raise `ChannelError` unless they are integers and, where that can be seen, in the table."""
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


def check_layout(losses: Tensor, ids: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise `ChannelError` unless there is one id per sequence, `BoundaryError` for bad bounds."""
    if cu_seqlens is None:
        held = losses.shape[0] if losses.dim() == 2 else 1
        source = f"token_losses has shape {list(losses.shape)} and cu_seqlens is not given"
    else:
        if can_read(cu_seqlens):
            check_cu_seqlens(cu_seqlens, losses.numel())
        else:
            check_cu_seqlens_type(cu_seqlens)
        held = cu_seqlens.numel() - 1
        source = f"cu_seqlens has {held + 1} bounds"
    if ids.dim() != 1 or ids.numel() != held:
        came = f"{ids.numel()} entries" if ids.dim() == 1 else f"shape {list(ids.shape)}"
        raise ChannelError(
            f"channels has {came} but the batch holds {held} sequences ({source}); pass one "
            "channel per sequence."
        )


def _check_shape(name: str, value: Tensor | None, shape: torch.Size) -> None:
    if value is not None and value.shape != shape:
        raise ChannelMetricsError(
            f"{name} must have the shape of token_losses {list(shape)}, but has "
            f"{list(value.shape)}; shift and flatten both in the same way."
        )


def _mask(losses: Tensor, labels: Tensor | None, loss_mask: Tensor | None) -> Tensor:
    if loss_mask is not None and loss_mask.dtype != torch.bool:
        loss_mask = loss_mask != 0
    if labels is None:
        return torch.ones_like(losses, dtype=torch.bool) if loss_mask is None else loss_mask
    mask = labels != IGNORE_INDEX
    return mask if loss_mask is None else mask & loss_mask
