"""Token losses -> sums per sequence -> sums per channel. Pure, no host sync, static shapes.

Letters: T = num_tokens, N = num_sequences, K = columns. The sums per sequence are kept apart
from the grouping, so that a second way of grouping is one more id tensor and one more small
reduction over the same [K, N], never a second pass over tokens. Columns come first: adding up
groups of a contiguous [N] is several times cheaper than adding up rows of [N, K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from channel_metrics.core.cu_seqlens import to_target_frame

__all__ = [
    "COLUMNS",
    "NUM_COLUMNS",
    "TokenValues",
    "group_sums",
    "num_columns_of",
    "sequence_sums",
    "table_rows",
    "token_sums",
    "with_rest",
]

# Everything is a sum: over tokens, or (samples) over sequences. What not every micro-batch has
# comes last, so that it can be left out.
COLUMNS = (
    "tokens",  # supervised tokens
    "samples",  # sequences with at least one position
    "nll",  # finite token losses
    "correct",  # tokens whose target was predicted
    "judged",  # tokens for which correctness was given: the denominator of `correct`
    "nonfinite",  # supervised tokens whose loss is NaN or infinite, kept out of the sums
    "weighted_nll",  # weight * loss
    "weight",  # the denominator of `weighted_nll`
)
NUM_COLUMNS = len(COLUMNS)
_INDEX = {name: index for index, name in enumerate(COLUMNS)}


class TokenValues(NamedTuple):
    """What is known of each position of a micro-batch; all tensors of one shape, [T] or [B, S].

    losses: nll in nats, any float dtype. mask: bool, the supervised positions. correct: bool,
    or None where not measured. weights: float, or None.
    """

    losses: Tensor
    mask: Tensor
    correct: Tensor | None = None
    weights: Tensor | None = None

    def map(self, moved: Callable[[Tensor], Tensor]) -> TokenValues:
        """The same, each tensor moved in the same way."""
        return TokenValues(
            losses=moved(self.losses),
            mask=moved(self.mask),
            correct=None if self.correct is None else moved(self.correct),
            weights=None if self.weights is None else moved(self.weights),
        )

    def in_target_frame(self) -> TokenValues:
        """The same values at the positions they speak about, see `to_target_frame`."""
        return self.map(to_target_frame)


def num_columns_of(values: TokenValues, *, finite: bool = False) -> int:
    """How many of COLUMNS, from the left, these values can fill; the others stay zero.

    finite: all losses and weights are known to be finite.
    """
    if values.weights is not None:
        return NUM_COLUMNS
    if not finite:
        return _INDEX["nonfinite"] + 1
    return _INDEX["correct" if values.correct is None else "nonfinite"]


def sequence_sums(
    values: TokenValues, cu_seqlens: Tensor | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[K, N + 1] sums per sequence; the last one holds what lies past the last bound.

    K is `num_columns_of(values)`. Without `cu_seqlens`, values of shape [B, S] mean one sequence
    per row, and [T] one sequence; then nothing lies past them, and the result is [K, N].
    """
    columns = _token_columns(values, dtype, finite=False)
    num_columns = num_columns_of(values)
    if cu_seqlens is None:
        return _row_sums(columns, values, dtype, num_columns)
    lengths = with_rest(cu_seqlens, values).diff().long()
    samples = (lengths > 0).to(dtype)
    samples[-1:] = 0
    sums = _segment_sums(list(columns.values()), lengths, dtype)
    by_name = dict(zip(columns, sums.unbind(), strict=True), samples=samples)
    return _in_order(by_name, values, num_columns)


def with_rest(cu_seqlens: Tensor, values: TokenValues) -> Tensor:
    """[N + 2] bounds: one sequence more, of what lies past the last one."""
    return torch.nn.functional.pad(cu_seqlens, (0, 1), value=values.losses.numel())


def token_sums(
    values: TokenValues, dtype: torch.dtype = torch.float64, *, finite: bool = False
) -> Tensor:
    """[K, T]: each token by itself, to be grouped by token-level ids.

    For layouts that boundaries cannot describe after sharding. `samples` stays zero: a shard
    does not know how many sequences it holds a part of.
    """
    columns = _token_columns(values, dtype, finite=finite)
    tokens = {name: column.flatten().to(dtype) for name, column in columns.items()}
    return _in_order(tokens, values, num_columns_of(values, finite=finite))


def table_rows(ids: Tensor, num_rows: int, num_sums: int, *, checked: bool = False) -> Tensor:
    """[num_sums] rows of the table for `ids` [N], and for what lies past the last bound.

    Row 0 is `unlabeled`, row i + 1 is channel i; ids outside the table (-1 among them) and
    tokens past the last bound are unlabeled: seen, never dropped. checked: no id is outside.
    """
    rows = ids + 1
    if not checked:
        rows = rows.where((rows > 0) & (rows < num_rows), 0)
    return torch.nn.functional.pad(rows, (0, 1)) if num_sums > ids.numel() else rows


def group_sums(sums: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Sums of sequences or tokens [K, N] -> sums per channel [K, num_rows], see `table_rows`."""
    rows = table_rows(ids, num_rows, sums.shape[1])
    return sums.new_zeros(sums.shape[0], num_rows).index_add_(1, rows, sums)


def _token_columns(values: TokenValues, dtype: torch.dtype, *, finite: bool) -> dict[str, Tensor]:
    """The token tensors whose sums, in `dtype`, are the columns."""
    losses, mask = values.losses.detach(), values.mask
    # As 0 and 1 of one byte, masks are converted and multiplied several times faster.
    columns = {"tokens": mask.view(torch.uint8)}
    if values.correct is not None:
        columns["correct"] = (values.correct & mask).view(torch.uint8)
    weights = None if values.weights is None else values.weights.detach().to(dtype)
    if finite:
        columns["nll"] = losses * columns["tokens"]
        if weights is not None:
            columns["weight"] = weights * columns["tokens"]
    else:
        is_finite = losses.abs() < torch.inf  # half of the kernels of torch.isfinite
        counted = mask & is_finite
        columns["nll"] = losses.where(counted, 0)
        columns["nonfinite"] = (mask & ~is_finite).view(torch.uint8)
        if weights is not None:
            columns["weight"] = weights.where(counted, 0)
    if weights is not None:
        columns["weighted_nll"] = columns["weight"] * columns["nll"].to(dtype)
    return columns


def _row_sums(
    columns: dict[str, Tensor], values: TokenValues, dtype: torch.dtype, num_columns: int
) -> Tensor:
    """[K, N]: every row is one sequence."""
    shape = values.losses.shape
    rows, size = shape if len(shape) == 2 else (1, *shape)
    sums = values.losses.new_zeros((num_columns, rows), dtype=dtype)
    if size:
        sums[_INDEX["samples"]] = 1.0
    for name, column in columns.items():
        of_rows = column if column.dim() == 2 else column.view(1, size)
        torch.sum(of_rows, -1, dtype=dtype, out=sums[_INDEX[name]])
    if values.correct is not None:
        sums[_INDEX["judged"]] = sums[_INDEX["tokens"]]
    return sums


def _segment_sums(columns: list[Tensor], lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """[k, N] sums of k columns of T tokens each, in segments of `lengths` [N] that add up to T."""
    # Behind each other they are one axis, and one reduction; on a device it is several kernels.
    flat = lengths.new_empty((len(columns), columns[0].numel()), dtype=dtype)
    for row, column in enumerate(columns):
        flat[row].copy_(column.flatten())
    # unsafe=True: the check that the lengths fit would read them, a device-to-host sync.
    sums = torch.segment_reduce(
        flat.view(-1), "sum", lengths=torch.cat([lengths] * len(columns)), unsafe=True, initial=0
    )
    return sums.view(len(columns), -1)


def _in_order(sums: dict[str, Tensor], values: TokenValues, num_columns: int) -> Tensor:
    """Sums by name -> one tensor [K, ...] in the order of COLUMNS, zero where absent."""
    if values.correct is not None:
        sums["judged"] = sums["tokens"]
    wanted = COLUMNS[:num_columns]
    if not sums.keys() >= set(wanted):
        sums = dict.fromkeys(wanted, torch.zeros_like(sums["tokens"])) | sums
    return torch.stack([sums[name] for name in wanted])
