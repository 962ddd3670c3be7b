"""Reads where the sequences of a batch begin and end, from every form that batches carry.

    >>> import torch
    >>> boundaries_from_position_ids(torch.tensor([[0, 1, 2, 0, 1]])).cu_seqlens
    tensor([0, 3, 5], dtype=torch.int32)

Letters: B rows, S row length, T = num_tokens of the flattened token axis (B * S for a padded
batch), N = num_sequences. The functions change no argument. They check the values of their input,
so call them on the host, in the collator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.cu_seqlens import (
    Boundaries,
    boundaries_from_cu_seqlens,
    boundaries_from_packed_seq_params,
    check_cu_seqlens,
    check_cu_seqlens_type,
    rows_as_sequences,
    sequence_index,
    to_target_frame,
    token_channel_ids,
)
from channel_metrics.core.masks import (
    boundaries_from_attention_mask,
    boundaries_from_position_ids,
    boundaries_from_seq_idx,
)
from channel_metrics.errors import BoundaryError

__all__ = [
    "Boundaries",
    "boundaries_from_attention_mask",
    "boundaries_from_batch",
    "boundaries_from_cu_seqlens",
    "boundaries_from_packed_seq_params",
    "boundaries_from_position_ids",
    "boundaries_from_seq_idx",
    "check_cu_seqlens",
    "check_cu_seqlens_type",
    "rows_as_sequences",
    "sequence_index",
    "to_target_frame",
    "token_channel_ids",
]

_CU_SEQLENS_KEYS = ("cu_seqlens", "cu_seq_lens_q")


def boundaries_from_batch(batch: Mapping[str, Any]) -> Boundaries:
    """The boundaries of a collated batch, in whatever form it carries them.

    The first of these that the batch holds is used: `cu_seqlens`, `cu_seq_lens_q`,
    `packed_seq_params`, `seq_idx`, an `attention_mask` with segment numbers or of 4 axes,
    `position_ids`, any other `attention_mask`. Without all of them, each row is one sequence.

    Args:
        batch: holds `labels`, `input_ids` or a 2-D `attention_mask`, of shape [B, S] or [T]. The
            first of them gives the token axis.

    Returns:
        The boundaries over the flattened token axis.

    Raises:
        BoundaryError: the batch has no token tensor, or its boundaries do not fit its tokens.
    """
    shape = _token_shape(batch)
    num_tokens = shape.numel()
    for key in _CU_SEQLENS_KEYS:
        if batch.get(key) is not None:
            bounds = batch[key]
            flat = bounds.flatten() if isinstance(bounds, Tensor) else bounds
            return boundaries_from_cu_seqlens(flat, num_tokens)
    if batch.get("packed_seq_params") is not None:
        return boundaries_from_packed_seq_params(batch["packed_seq_params"], num_tokens)
    found = _implicit_boundaries(batch, shape)
    covered = int(found.cu_seqlens[-1])
    if covered != num_tokens:
        raise BoundaryError(
            f"the attention mask (or seq_idx) covers {covered} positions but the batch holds "
            f"{num_tokens} tokens; they must describe the same tokens."
        )
    return found


def _token_shape(batch: Mapping[str, Any]) -> torch.Size:
    for key in ("labels", "input_ids", "attention_mask"):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() in (1, 2):
            return value.shape
    seen = {k: list(v.shape) for k, v in batch.items() if isinstance(v, Tensor)}
    raise BoundaryError(
        "a batch needs labels, input_ids or a 2-D attention_mask of shape [B, S] or "
        f"[num_tokens] to find its sequences, but it holds {seen or 'no tensors'}; pass "
        "cu_seqlens."
    )


def _implicit_boundaries(batch: Mapping[str, Any], shape: torch.Size) -> Boundaries:
    rows = shape if len(shape) == 2 else torch.Size((1, *shape))
    if batch.get("seq_idx") is not None:
        return boundaries_from_seq_idx(batch["seq_idx"])
    mask = _own_mask(batch, shape)
    if mask is not None and (mask.dim() == 4 or (mask.numel() and int(mask.max()) > 1)):
        return boundaries_from_attention_mask(mask)
    position_ids = batch.get("position_ids")
    # Position ids of other shapes (several axes, one row for all) do not show the sequences.
    if isinstance(position_ids, Tensor) and position_ids.shape in (shape, rows, _flat(rows)):
        return boundaries_from_position_ids(position_ids.view(rows), mask)
    if mask is not None:
        return boundaries_from_attention_mask(mask)
    return Boundaries(rows_as_sequences(*rows))


def _flat(rows: torch.Size) -> torch.Size:
    return rows[1:] if rows[0] == 1 else rows


def _own_mask(batch: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """The attention mask of the tokens; None if it belongs to the input of an encoder."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor):
        return None
    inputs = batch.get("input_ids")
    if not isinstance(inputs, Tensor):
        return mask.unsqueeze(0) if mask.dim() == 1 else mask
    encoder = inputs.shape != shape or batch.get("decoder_input_ids") is not None
    if encoder and mask.shape[0] == shape[0] and mask.shape[-1] == inputs.shape[-1]:
        return None
    return mask.unsqueeze(0) if mask.dim() == 1 else mask
