"""Reads boundaries from masks and position ids, for batches that have no `cu_seqlens`.

Letters: B rows, S row length, T = num_tokens. The functions change no argument. They read values,
so call them on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from channel_metrics.core.cu_seqlens import (
    Boundaries,
    can_read,
    rows_as_sequences,
    sequence_index,
)
from channel_metrics.errors import BoundaryError

__all__ = [
    "as_bool",
    "boundaries_from_attention_mask",
    "boundaries_from_position_ids",
    "boundaries_from_seq_idx",
]


def as_bool(values: Tensor) -> Tensor:
    """bool, True where values are not 0. A bool tensor gets bytes of 0 and 1 only."""
    if values.dtype != torch.bool:
        return values != 0
    # A uint8 tensor that was viewed as bool may hold other bytes, and kernels compute with them.
    in_bytes = values.view(torch.uint8)
    sound = can_read(values) and (not values.numel() or int(in_bytes.amax().item()) <= 1)
    return values if sound else in_bytes != 0


def boundaries_from_attention_mask(attention_mask: Tensor) -> Boundaries:
    """The boundaries that an attention mask gives.

    Args:
        attention_mask: one of three forms.
            [B, S] of 0 and 1: each row is one sequence, padded on either side.
            [B, S] of segment numbers 1..n, 0 for padding: each number of a row is one sequence.
            [B, 1, S, S], bool or additive float: each block on the diagonal is one sequence,
            causal or not. Positions that attend to nothing are padding.

    Raises:
        BoundaryError: the mask has none of these forms.
    """
    if attention_mask.dim() == 4:
        return _from_block_diagonal(attention_mask)
    if attention_mask.dim() != 2:
        raise BoundaryError(
            "attention_mask must be [B, S] or block-diagonal [B, 1, S, S], but has shape "
            f"{list(attention_mask.shape)}; pass cu_seqlens for other layouts."
        )
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise BoundaryError(
            f"a 2-D attention_mask must be bool or integer, but is {attention_mask.dtype}."
        )
    bits = attention_mask.dtype == torch.bool
    numbers = (as_bool(attention_mask) if bits else attention_mask).long()
    if numbers.numel() and int(numbers.min()) < 0:
        raise BoundaryError(
            f"attention_mask must hold 0/1 or segment numbers, but holds {int(numbers.min())}."
        )
    if numbers.numel() and int(numbers.max()) > 1:
        return _from_segment_numbers(numbers)
    num_rows, row_length = attention_mask.shape
    keep = numbers.bool().flatten()
    return Boundaries(rows_as_sequences(num_rows, row_length), None if bool(keep.all()) else keep)


def boundaries_from_position_ids(
    position_ids: Tensor, attention_mask: Tensor | None = None
) -> Boundaries:
    """The boundaries that position ids give, if they restart with every sequence.

    Every row starts a sequence. Pads at the end of a row that are not masked look like sequences
    of length 1. Then there are more sequences than channels, and the collator raises an error.

    Args:
        position_ids: integer [B, S] or [T]. A sequence may start at 0 or at another number.
        attention_mask: [B, S] of 0 and 1. Its pad positions never start a sequence.

    Raises:
        BoundaryError: position_ids has another shape, or the mask has not the same.
    """
    if position_ids.dim() == 1:
        position_ids = position_ids.unsqueeze(0)
    if position_ids.dim() != 2:
        raise BoundaryError(
            "position_ids must be [B, S] or [num_tokens] to give boundaries, but has shape "
            f"{list(position_ids.shape)}; pass cu_seqlens for multi-axis position ids."
        )
    keep = torch.ones_like(position_ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != position_ids.shape:
            raise BoundaryError(
                f"attention_mask has shape {list(attention_mask.shape)} but position_ids has "
                f"{list(position_ids.shape)}; they describe the same tokens."
            )
        keep = as_bool(attention_mask)
    before = _kept_before(keep)
    previous = position_ids.gather(1, before.clamp(min=0))
    restarts = (before < 0) | (position_ids < previous)
    # After a sequence of one token, the position does not fall: it repeats the start position.
    first = torch.isin(position_ids, position_ids[keep & restarts])
    return _from_starts(keep & (restarts | (first & (position_ids == previous))), keep)


def boundaries_from_seq_idx(seq_idx: Tensor) -> Boundaries:
    """The boundaries that `seq_idx` gives.

    Args:
        seq_idx: integer [B, S] or [T], the number of the sequence of each token; -1 for padding.

    Raises:
        BoundaryError: it has another type or shape, or a row holds padding only.
    """
    if seq_idx.dim() == 1:
        seq_idx = seq_idx.unsqueeze(0)
    if seq_idx.dim() != 2 or seq_idx.is_floating_point():
        raise BoundaryError(
            "seq_idx must be an integer tensor [B, S] or [num_tokens], but is "
            f"{seq_idx.dtype} of shape {list(seq_idx.shape)}."
        )
    return _from_segment_numbers((seq_idx + 1).long())


def _from_starts(starts: Tensor, keep: Tensor) -> Boundaries:
    """Boundaries from `starts` and `keep`, both bool [B, S]; pads never start a sequence.

    Pads before the first start of a row belong to that first sequence. All other pads belong to
    the sequence before them. So every position has an owner.
    """
    num_rows, row_length = starts.shape
    starts = starts | (keep & (keep.cumsum(1) == 1))
    opens = starts & (starts.cumsum(1) > 1)
    if row_length == 0:
        return Boundaries(rows_as_sequences(num_rows, 0))
    opens[:, 0] = True
    bounds = opens.flatten().nonzero().flatten()
    end = bounds.new_tensor([num_rows * row_length])
    keep = keep.flatten()
    return Boundaries(torch.cat([bounds, end]).to(torch.int32), None if bool(keep.all()) else keep)


def _from_segment_numbers(numbers: Tensor) -> Boundaries:
    """Boundaries from segment numbers [B, S], 0 for padding; a new number starts a sequence."""
    keep = numbers > 0
    if not bool(keep.any(1).all()):
        row = int((~keep.any(1)).nonzero()[0])
        raise BoundaryError(
            f"row {row} of the segment numbers holds padding only, so its sequences cannot be "
            "counted; drop the row or pass cu_seqlens."
        )
    before = _kept_before(keep)
    previous = torch.where(before >= 0, numbers.gather(1, before.clamp(min=0)), 0)
    return _from_starts(keep & (numbers != previous), keep)


def _kept_before(keep: Tensor) -> Tensor:
    """int64 [B, S]: the last kept position before each position; -1 if there is none."""
    positions = torch.arange(keep.shape[1], device=keep.device)
    index = torch.where(keep, positions.expand_as(keep), -1)
    return torch.nn.functional.pad(index.cummax(1).values, (1, 0), value=-1)[:, :-1]


def _from_block_diagonal(mask: Tensor) -> Boundaries:
    if mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        raise BoundaryError(
            "a 4-D attention_mask must be [B, 1, S, S] to give boundaries, but has shape "
            f"{list(mask.shape)}; pass cu_seqlens."
        )
    if mask.is_floating_point() and mask.numel() and float(mask.max()) > 0:
        raise BoundaryError(
            "a 4-D float attention_mask must be additive (0 where attention is allowed, negative "
            f"elsewhere), but holds {float(mask.max())}; pass 0/1 masks as bool."
        )
    # Additive masks hold 0 where attention is allowed and a large negative number elsewhere.
    allowed = mask[:, 0] >= 0 if mask.is_floating_point() else as_bool(mask[:, 0])
    keep = allowed.diagonal(dim1=1, dim2=2)
    before = _kept_before(keep)
    # What it gives for the first kept position of a row does not matter: that is a start.
    joined = allowed.gather(2, before.clamp(min=0).unsqueeze(2)).squeeze(2)
    boundaries = _from_starts(keep & ~joined, keep)
    owner = sequence_index(boundaries.cu_seqlens, keep.numel()).view(keep.shape)
    same = (owner[:, :, None] == owner[:, None, :]) & keep[:, :, None] & keep[:, None, :]
    causal = same & torch.ones_like(same[0]).tril()
    # It does not matter what pad positions attend to.
    allowed = allowed & keep[:, :, None]
    if not (torch.equal(allowed, causal) or torch.equal(allowed, same)):
        raise BoundaryError(
            "a 4-D attention_mask must be block-diagonal (causal or full inside each block) to "
            "give boundaries, but this one is not; pass cu_seqlens."
        )
    return boundaries
