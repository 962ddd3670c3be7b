"""Token losses -> sums per sequence -> sums per channel. Pure, no host sync, static shapes.

Letters: T = num_tokens, N = num_sequences, K = columns. The sums per sequence are kept apart
from the grouping, so that a second way of grouping is one more id tensor and one more small
reduction over the same [N, K], never a second pass over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from channel_metrics.cu_seqlens import to_target_frame

__all__ = [
    "COLUMNS",
    "NUM_COLUMNS",
    "TokenValues",
    "group_sums",
    "sequence_sums",
    "token_group_sums",
]

# Everything is a sum: over tokens, or (samples) over sequences.
COLUMNS = (
    "tokens",  # supervised tokens
    "samples",  # sequences with at least one position
    "nll",  # finite token losses
    "nonfinite",  # supervised tokens whose loss is NaN or infinite, kept out of the sums
    "correct",  # tokens whose target was predicted
    "judged",  # tokens for which correctness was given: the denominator of `correct`
    "weighted_nll",  # weight * loss
    "weight",  # the denominator of `weighted_nll`
)
NUM_COLUMNS = len(COLUMNS)


@dataclass(frozen=True)
class TokenValues:
    """What is known of each position of a micro-batch; all tensors of one shape, [T] or [B, S].

    losses: nll in nats, any float dtype. mask: bool, the supervised positions. correct: bool,
    or None where not measured. weights: float, or None.
    """

    losses: Tensor
    mask: Tensor
    correct: Tensor | None = None
    weights: Tensor | None = None

    def in_target_frame(self) -> TokenValues:
        """The same values at the positions they speak about, see `to_target_frame`."""
        return TokenValues(
            losses=to_target_frame(self.losses),
            mask=to_target_frame(self.mask),
            correct=None if self.correct is None else to_target_frame(self.correct),
            weights=None if self.weights is None else to_target_frame(self.weights),
        )


def sequence_sums(
    values: TokenValues, cu_seqlens: Tensor | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[N + 1, K] sums per sequence; the last row holds what lies past the last bound.

    Without `cu_seqlens`, values of shape [B, S] mean one sequence per row, and [T] one sequence.
    """
    columns = _token_columns(values, dtype)
    if cu_seqlens is None:
        shape = values.losses.shape
        rows = shape[0] if len(shape) == 2 else 1
        sums = {n: c.reshape(rows, shape[-1]).sum(-1) for n, c in columns.items()}
        sums["samples"] = torch.full_like(sums["tokens"], 1.0 if shape[-1] > 0 else 0.0)
        return torch.nn.functional.pad(_assemble(sums), (0, 0, 0, 1))
    end = cu_seqlens.new_full((1,), values.losses.numel())
    lengths = torch.cat([cu_seqlens, end]).diff().long()
    sums = _segment_sums(columns, lengths)
    sums["samples"] = torch.nn.functional.pad((lengths[:-1] > 0).to(dtype), (0, 1))
    return _assemble(sums)


def group_sums(sums: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Sums per sequence [N + 1, K] -> sums per channel [num_rows, K].

    `ids` is int64 [N]. Row 0 is `unlabeled`, row i + 1 is channel i; ids outside the table
    (-1 among them) and tokens past the last bound are unlabeled: seen, never dropped.
    """
    rows = torch.nn.functional.pad(_table_rows(ids, num_rows), (0, 1))
    return sums.new_zeros(num_rows, sums.shape[1]).index_add_(0, rows, sums)


def token_group_sums(
    values: TokenValues, ids: Tensor, num_rows: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[num_rows, K] sums per channel from token-level ids of the shape of the values.

    For layouts that boundaries cannot describe after sharding. `samples` stays zero: a shard
    does not know how many sequences it holds a part of.
    """
    columns = _assemble({n: c.flatten() for n, c in _token_columns(values, dtype).items()})
    rows = _table_rows(ids.flatten(), num_rows)
    return columns.new_zeros(num_rows, NUM_COLUMNS).index_add_(0, rows, columns)


def _table_rows(ids: Tensor, num_rows: int) -> Tensor:
    rows = ids.long() + 1
    return torch.where((rows > 0) & (rows < num_rows), rows, torch.zeros_like(rows))


def _token_columns(values: TokenValues, dtype: torch.dtype) -> dict[str, Tensor]:
    """The columns that these values have, as token tensors in `dtype`."""
    losses, mask = values.losses.detach(), values.mask
    finite = torch.isfinite(losses)
    counted = mask & finite
    zero = torch.zeros((), dtype=dtype, device=losses.device)
    nll = torch.where(counted, losses.to(dtype), zero)
    columns = {
        "tokens": mask.to(dtype),
        "nll": nll,
        "nonfinite": (mask & ~finite).to(dtype),
    }
    if values.correct is not None:
        columns["correct"] = (values.correct & mask).to(dtype)
        columns["judged"] = columns["tokens"]
    if values.weights is not None:
        columns["weight"] = torch.where(counted, values.weights.detach().to(dtype), zero)
        columns["weighted_nll"] = columns["weight"] * nll
    return columns


def _segment_sums(columns: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
    stacked = torch.stack([column.flatten() for column in columns.values()], dim=-1)
    # unsafe=True: the check that the lengths fit would read them, a device-to-host sync.
    sums = torch.segment_reduce(stacked, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return dict(zip(columns, sums.unbind(-1), strict=True))


def _assemble(columns: dict[str, Tensor]) -> Tensor:
    """Columns by name -> one tensor [..., K] in the order of COLUMNS, zero where absent."""
    absent = torch.zeros_like(columns["tokens"])
    return torch.stack([columns.get(name, absent) for name in COLUMNS], dim=-1)
