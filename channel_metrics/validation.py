"""Checks of the token tensors of one micro-batch; nothing here reads a device value."""

from __future__ import annotations

import torch
from torch import Tensor

from channel_metrics.errors import ChannelMetricsError
from channel_metrics.statistics import TokenValues

__all__ = ["IGNORE_INDEX", "token_values"]

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
    for name, value in (
        ("labels", labels),
        ("loss_mask", loss_mask),
        ("correct", correct),
        ("weights", weights),
    ):
        if value is not None and value.shape != token_losses.shape:
            raise ChannelMetricsError(
                f"{name} must have the shape of token_losses {list(token_losses.shape)}, but "
                f"has {list(value.shape)}; shift and flatten both in the same way."
            )
    if labels is not None and labels.is_floating_point():
        raise ChannelMetricsError(f"labels must be integer token ids, but is {labels.dtype}.")
    if correct is not None and correct.dtype != torch.bool:
        raise ChannelMetricsError(f"correct must be bool, but is {correct.dtype}.")
    mask = torch.ones_like(token_losses, dtype=torch.bool)
    if labels is not None:
        mask = labels != IGNORE_INDEX
    if loss_mask is not None:
        mask = mask & (loss_mask != 0)
    return TokenValues(token_losses, mask, correct, weights)
