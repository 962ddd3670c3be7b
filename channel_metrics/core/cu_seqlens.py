"""Checks and uses `cu_seqlens`, the boundaries of sequences in a flattened token axis.

Letters: T = num_tokens of the flattened token axis (B * S for a padded batch),
N = num_sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from channel_metrics.errors import BoundaryError

__all__ = [
    "Boundaries",
    "boundaries_from_cu_seqlens",
    "boundaries_from_packed_seq_params",
    "can_read",
    "check_cu_seqlens",
    "check_cu_seqlens_type",
    "rows_as_sequences",
    "sequence_index",
    "to_target_frame",
    "token_channel_ids",
]


@dataclass(frozen=True)
class Boundaries:
    """The sequences of one micro-batch.

    Attributes:
        cu_seqlens: int32 [N + 1], bounds in the flattened token axis [T]. A sequence includes its
            padding.
        keep: bool [T], False at pad positions; None if there are none.
    """

    cu_seqlens: Tensor
    keep: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.cu_seqlens.numel() - 1

    def unpadded_cu_seqlens(self) -> Tensor:
        """int32 [N + 1]: cumulative lengths of the sequences without their padding."""
        if self.keep is None:
            return self.cu_seqlens
        kept_before = torch.nn.functional.pad(self.keep.to(torch.int64).cumsum(0), (1, 0))
        return kept_before[self.cu_seqlens.long()].to(torch.int32)


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> tuple[int, int]:
    """Check the values of `cu_seqlens` [N + 1]. Call it for tensors on the host only.

    Returns:
        The last bound, and the length of the shortest sequence (0 if there is no sequence).

    Raises:
        BoundaryError: the bounds do not start at 0, decrease, or go beyond num_tokens.
    """
    check_cu_seqlens_type(cu_seqlens)
    ends = cu_seqlens.aminmax()
    lowest, highest = int(ends[0].item()), int(ends[1].item())
    # The difference of two bounds in [0, 2**31) fits into int32, so `diff` cannot overflow.
    shortest = int(cu_seqlens.diff().aminmax()[0].item()) if cu_seqlens.numel() > 1 else 0
    if lowest != 0 or shortest < 0 or highest > num_tokens:
        raise _bounds_error(cu_seqlens, num_tokens)
    return highest, shortest


def _bounds_error(cu_seqlens: Tensor, num_tokens: int) -> BoundaryError:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        return BoundaryError(
            f"cu_seqlens must start at 0, but starts at {first}; it holds cumulative "
            "sequence lengths, the first bound is the start of the first sequence."
        )
    falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if len(falls):
        at = int(falls[0])
        return BoundaryError(
            f"cu_seqlens must not decrease, but goes from {int(cu_seqlens[at])} to "
            f"{int(cu_seqlens[at + 1])} at entry {at + 1}; pass cumulative lengths, not lengths."
        )
    return BoundaryError(
        f"cu_seqlens ends at {last}, but the batch holds {num_tokens} tokens; "
        "take the boundaries from the same micro-batch as the tokens."
    )


def check_cu_seqlens_type(cu_seqlens: Tensor) -> None:
    """Raise `BoundaryError` unless `cu_seqlens` is a 1-D int32 or int64 tensor, and not empty."""
    if not isinstance(cu_seqlens, Tensor):
        raise BoundaryError(
            f"cu_seqlens must be an int32 tensor, but is {type(cu_seqlens).__name__}; pass "
            "torch.tensor(cu_seqlens, dtype=torch.int32)."
        )
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
    """int32 [B + 1]: the bounds of a [B, S] batch whose rows are one sequence each."""
    return torch.arange(num_rows + 1, dtype=torch.int32, device="cpu") * row_length


def boundaries_from_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> Boundaries:
    """From explicit bounds [N + 1]; raises `BoundaryError` if they do not fit `num_tokens`."""
    check_cu_seqlens(cu_seqlens, num_tokens)
    return Boundaries(cu_seqlens.to(torch.int32))


def boundaries_from_packed_seq_params(params: Any, num_tokens: int) -> Boundaries:
    """From Megatron's `PackedSeqParams`: from the padded bounds if it has them, else the others.

    `cu_seqlens_q_padded` says where the tokens are. `cu_seqlens_q` says how long the sequences
    are. The difference is padding at the end of each sequence.

    Args:
        params: a `PackedSeqParams`.
        num_tokens: T.

    Raises:
        BoundaryError: it has no bounds, or they do not fit each other or num_tokens.
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
    offset = torch.arange(num_tokens, device=padded.device) - padded.long()[safe]
    return Boundaries(padded.to(torch.int32), inside & (offset < lengths.diff().long()[safe]))


def sequence_index(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence that owns each position; N for positions past the last bound.

    Shapes are static and there is no host sync, so it works on the device and under
    `torch.compile`.

    Args:
        cu_seqlens: integer [N + 1].
        num_tokens: T.
    """
    # How many sequences end at or before a position. A running sum is much faster than a search.
    ends = cu_seqlens[1:].long().clamp(0, num_tokens)
    marks = torch.zeros(num_tokens + 1, dtype=torch.int64, device=cu_seqlens.device)
    return marks.scatter_add_(0, ends, torch.ones_like(ends)).cumsum(0)[:num_tokens]


def token_channel_ids(channels: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the channel id of each position; -1 past the last bound.

    Use it for sharded layouts that `cu_seqlens` cannot describe: cut these ids as the labels are
    cut.

    Args:
        channels: int64 [N], the id of each sequence.
        cu_seqlens: integer [N + 1].
        num_tokens: T.
    """
    padded = torch.cat([channels.long(), channels.new_full((1,), -1, dtype=torch.int64)])
    return padded[sequence_index(cu_seqlens, num_tokens)]


def to_target_frame(values: Tensor) -> Tensor:
    """Move [..., S] values from the position that predicts to the position that is predicted.

    The causal loss at position t is about token t + 1. Afterwards, position t holds the value of
    token t, so unshifted labels and boundaries fit, and the first token of a sequence is counted
    for its own sequence. The value of the last position moves to position 0, where it has no
    meaning: mask it.
    """
    return values.roll(1, dims=-1)


def can_read(values: Tensor) -> bool:
    """Whether values can be read without cost: on the host, and outside of `torch.compile`."""
    return values.is_cpu and not torch.compiler.is_compiling()
