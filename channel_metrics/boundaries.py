"""Where the sequences of a batch begin and end: every form found in the wild, as `cu_seqlens`.

    >>> import torch
    >>> boundaries_from_position_ids(torch.tensor([[0, 1, 2, 0, 1]])).cu_seqlens
    tensor([0, 3, 5], dtype=torch.int32)

Letters: B rows, S row length, T = num_tokens of the flattened token axis (B * S for a padded
batch), N = num_sequences. Everything here is pure and meant for the host, in the collator: the
functions check their input and may read values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    "rows_as_sequences",
    "sequence_index",
    "to_target_frame",
    "token_channel_ids",
]

_CU_SEQLENS_KEYS = ("cu_seqlens", "cu_seq_lens_q")


@dataclass(frozen=True)
class Boundaries:
    """The sequences of one micro-batch.

    cu_seqlens: int32 [N + 1], bounds in the flattened token axis [T]; padding lies inside them.
    keep: bool [T], False at pad positions; None when there are none.
    """

    cu_seqlens: Tensor
    keep: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    def unpadded_cu_seqlens(self) -> Tensor:
        """int32 [N + 1]: cumulative true lengths, as if the pad positions were cut out."""
        if self.keep is None:
            return self.cu_seqlens
        kept_before = torch.nn.functional.pad(self.keep.to(torch.int64).cumsum(0), (1, 0))
        return kept_before[self.cu_seqlens.long()].to(torch.int32)


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise `BoundaryError` unless `cu_seqlens` [N + 1] rises from 0 to at most `num_tokens`.

    Reads the values: call it for tensors on the host only.
    """
    check_cu_seqlens_type(cu_seqlens)
    bounds = cu_seqlens.long()
    if int(bounds[0]) != 0:
        raise BoundaryError(
            f"cu_seqlens must start at 0, but starts at {int(bounds[0])}; it holds cumulative "
            "sequence lengths, the first bound is the start of the first sequence."
        )
    steps = bounds.diff()
    if bool((steps < 0).any()):
        at = int((steps < 0).nonzero()[0])
        raise BoundaryError(
            f"cu_seqlens must not decrease, but goes from {int(bounds[at])} to "
            f"{int(bounds[at + 1])} at entry {at + 1}; pass cumulative lengths, not lengths."
        )
    if int(bounds[-1]) > num_tokens:
        raise BoundaryError(
            f"cu_seqlens ends at {int(bounds[-1])}, but the batch holds {num_tokens} tokens; "
            "take the boundaries from the same micro-batch as the tokens."
        )


def check_cu_seqlens_type(cu_seqlens: Tensor) -> None:
    """Raise `BoundaryError` unless `cu_seqlens` is a 1-D int32 or int64 tensor with an entry."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise BoundaryError(
            f"cu_seqlens must be int32 or int64, but is {cu_seqlens.dtype}; convert it with "
            ".to(torch.int32)."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise BoundaryError(
            f"cu_seqlens must have shape [num_sequences + 1], but has {list(cu_seqlens.shape)}; "
            "pass one flat list of bounds that starts at 0."
        )


def rows_as_sequences(num_rows: int, row_length: int) -> Tensor:
    """int32 [B + 1]: every row of a [B, S] batch is one sequence, padding included."""
    return torch.arange(num_rows + 1, dtype=torch.int32) * row_length


def boundaries_from_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> Boundaries:
    """Explicit boundaries (`cu_seqlens`, `cu_seq_lens_q`), checked against `num_tokens`."""
    check_cu_seqlens(cu_seqlens, num_tokens)
    return Boundaries(cu_seqlens.to(torch.int32))


def boundaries_from_packed_seq_params(params: Any, num_tokens: int) -> Boundaries:
    """Megatron's `PackedSeqParams`: the padded bounds where given, else the plain ones.

    `cu_seqlens_q_padded` says where the tokens sit; `cu_seqlens_q` says how long the sequences
    are. Their difference is padding, which lies at the end of each sequence.
    """
    lengths: Any = getattr(params, "cu_seqlens_q", None)
    padded: Any = getattr(params, "cu_seqlens_q_padded", None)
    if lengths is None and padded is None:
        raise BoundaryError(
            "packed_seq_params has neither cu_seqlens_q nor cu_seqlens_q_padded; without them "
            "the sequences of a packed batch cannot be told apart."
        )
    if padded is None:
        return boundaries_from_cu_seqlens(lengths, num_tokens)
    check_cu_seqlens(padded, num_tokens)
    if lengths is None or torch.equal(lengths, padded):
        return Boundaries(padded.to(torch.int32))
    check_cu_seqlens(lengths, num_tokens)
    if lengths.shape != padded.shape or bool((lengths.diff() > padded.diff()).any()):
        raise BoundaryError(
            "packed_seq_params.cu_seqlens_q must give a length of at most the padded one for "
            f"each sequence, but it is {lengths.tolist()} against {padded.tolist()}."
        )
    owner = sequence_index(padded, num_tokens)
    inside = owner < lengths.numel() - 1
    safe = owner.clamp(max=lengths.numel() - 2)
    offset = torch.arange(num_tokens) - padded.long()[safe]
    return Boundaries(padded.to(torch.int32), inside & (offset < lengths.diff().long()[safe]))


def boundaries_from_attention_mask(attention_mask: Tensor) -> Boundaries:
    """From a 2-D mask [B, S] of 0/1 or of segment numbers, or a 4-D block-diagonal one.

    0/1: every row is one sequence, left and right padding alike. Segment numbers 1..n (0 is
    padding): every number of a row is one sequence. 4-D [B, 1, S, S], bool or additive float:
    a sequence is a block, causal or not; positions that attend to nothing are padding.
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
    numbers = attention_mask.long()
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
    """From position ids [B, S] or [T] that restart at 0 with every sequence (padding-free).

    A 0/1 `attention_mask` [B, S] names the pad positions, which never start a sequence. Every
    row starts a sequence. A tail of pads that is not masked cannot be told from sequences of
    length 1; the number of channels will not fit it, and that is an error.
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
        keep = attention_mask.bool()
    return _from_starts((position_ids == 0) & keep, keep)


def boundaries_from_seq_idx(seq_idx: Tensor) -> Boundaries:
    """From `seq_idx` [B, S] or [T]: the number of the sequence each token is in (-1 is padding)."""
    if seq_idx.dim() == 1:
        seq_idx = seq_idx.unsqueeze(0)
    if seq_idx.dim() != 2 or seq_idx.is_floating_point():
        raise BoundaryError(
            "seq_idx must be an integer tensor [B, S] or [num_tokens], but is "
            f"{seq_idx.dtype} of shape {list(seq_idx.shape)}."
        )
    return _from_segment_numbers((seq_idx + 1).long())


def boundaries_from_batch(batch: Mapping[str, Any]) -> Boundaries:
    """The boundaries of a collated batch, whatever form it carries them in.

    Explicit ones win (`cu_seqlens`, `cu_seq_lens_q`, `packed_seq_params`, `seq_idx`), then
    `position_ids` that restart inside a row, then `attention_mask`; a [B, S] batch with none of
    them has one sequence per row. The token axis is that of `labels`, else of `input_ids`.
    """
    shape = _token_shape(batch)
    num_tokens = shape.numel()
    for key in _CU_SEQLENS_KEYS:
        if batch.get(key) is not None:
            return boundaries_from_cu_seqlens(batch[key].flatten(), num_tokens)
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


def sequence_index(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence that owns each position; N for positions past the last bound.

    Static shapes and no host sync: usable on the device and under `torch.compile`.
    """
    positions = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens[1:].contiguous(), right=True)


def token_channel_ids(channels: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the channel id of each position, -1 past the last bound.

    For layouts that `cu_seqlens` cannot describe after sharding: cut these ids exactly as the
    labels are cut. `channels` is int64 [N].
    """
    padded = torch.cat([channels.long(), channels.new_full((1,), -1, dtype=torch.int64)])
    return padded[sequence_index(cu_seqlens, num_tokens)]


def to_target_frame(values: Tensor) -> Tensor:
    """Move [..., S] values from the position that predicts to the position that is predicted.

    A causal loss at position t is about token t + 1. After this, position t holds what was
    said about token t, so boundaries and labels apply unshifted and a target that crosses a
    boundary is counted for its own sequence. What the last position predicts lies outside the
    row; it lands at position 0, which no position of the row predicts, and must be masked.
    """
    return values.roll(1, dims=-1)


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
    # Other shapes (several axes, one row for all) do not say where sequences begin.
    if isinstance(position_ids, Tensor) and position_ids.shape in (shape, rows, _flat(rows)):
        return boundaries_from_position_ids(position_ids.view(rows), mask)
    if mask is not None:
        return boundaries_from_attention_mask(mask)
    return Boundaries(rows_as_sequences(*rows))


def _flat(rows: torch.Size) -> torch.Size:
    return rows[1:] if rows[0] == 1 else rows


def _own_mask(batch: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """The attention mask of the tokens, or None where it describes an encoder's input."""
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


def _from_starts(starts: Tensor, keep: Tensor) -> Boundaries:
    """[B, S] sequence starts (kept positions only) and kept positions -> boundaries.

    Pads before the first start of a row belong to that first sequence, all others to the
    sequence before them: then no position is without an owner.
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
    """[B, S] segment numbers, 0 for padding; a new number opens a sequence."""
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
    """[B, S]: the last kept position before each one, else -1: pads in a row open nothing."""
    index = torch.where(keep, torch.arange(keep.shape[1]).expand_as(keep), -1)
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
    allowed = mask[:, 0] >= 0 if mask.is_floating_point() else mask[:, 0].bool()
    keep = allowed.diagonal(dim1=1, dim2=2)
    before = _kept_before(keep)
    joined = allowed.gather(2, before.clamp(min=0).unsqueeze(2)).squeeze(2) & (before >= 0)
    boundaries = _from_starts(keep & ~joined, keep)
    size = mask.shape[-1]
    owner = sequence_index(boundaries.cu_seqlens, keep.numel()).view(keep.shape)
    same = (owner[:, :, None] == owner[:, None, :]) & keep[:, :, None] & keep[:, None, :]
    causal = same & torch.ones(size, size, dtype=torch.bool).tril()
    # What pad positions attend to says nothing.
    allowed = allowed & keep[:, :, None]
    if not (torch.equal(allowed, causal) or torch.equal(allowed, same)):
        raise BoundaryError(
            "a 4-D attention_mask must be block-diagonal (causal or full inside each block) to "
            "give boundaries, but this one is not; pass cu_seqlens."
        )
    return boundaries
