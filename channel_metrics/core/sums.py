"""Adds up token values per sequence, or gives them per token.

The functions change no argument, have static shapes, and do not wait for the device. They sum per
sequence and not yet per channel, so another grouping needs no second pass over the tokens.

Letters: T = num_tokens, N = num_sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from channel_metrics.core.cu_seqlens import can_read, to_target_frame
from channel_metrics.core.masks import as_bool
from channel_metrics.core.places import Places
from channel_metrics.core.schema import TOKENS, Column
from channel_metrics.errors import ChannelMetricsError

__all__ = ["SequenceView", "TokenValues", "TokenView", "sequence_sums", "token_sums"]


class TokenValues(NamedTuple):
    """The values of each position of a micro-batch. All tensors have one shape, [T] or [B, S].

    Attributes:
        losses: nll in nats, of any float dtype.
        mask: bool, the supervised positions.
        correct: bool, whether the target was predicted; None if not measured.
        weights: float; None if tokens are not weighted.
        targets: int64, the token that each loss is about; None if no metric needs it.
        num_bytes, num_chars: its UTF-8 bytes and characters, int64; None if not known.
        entropy: of the distribution that predicted it, in nats; None if not measured.
        places, marks: see `MicroBatch`; None if not known or not needed.
    """

    losses: Tensor
    mask: Tensor
    correct: Tensor | None = None
    weights: Tensor | None = None
    targets: Tensor | None = None
    num_bytes: Tensor | None = None
    num_chars: Tensor | None = None
    entropy: Tensor | None = None
    places: Places | None = None
    marks: Tensor | None = None

    def map(self, moved: Callable[[Tensor], Tensor]) -> TokenValues:
        """The values after `moved` was applied to each tensor."""
        found: Any = (
            v.map(moved) if isinstance(v, Places) else v if v is None else moved(v) for v in self
        )
        return TokenValues(*found)

    def in_target_frame(self) -> TokenValues:
        """The values at the positions of their targets, see `to_target_frame`."""
        return self.map(to_target_frame)


class TokenView:
    """The token values as columns read them, without gradients.

    Each attribute has the shape of the losses, or is None if the micro-batch does not have it.
    All but losses and mask are 0 (False) where a position is not supervised. Those that are not
    bool have the dtype of the sums.

    Attributes:
        losses: as they were given.
        mask: bool, the supervised positions.
        nll: the losses that are finite, 0 for others.
        nonfinite: bool, whether the loss is NaN or infinite. None if all are known to be finite.
        correct: bool, whether the target was predicted.
        judged: bool, whether `correct` was given.
        weight: the weight of a token, 0 if it or the loss is not finite.
        weighted_nll: weight * nll.
        nonfinite_weight: bool, whether the loss is finite but the weight is not.
        text_bytes, text_chars, text_nll: bytes, characters and nll of the tokens that stand for
            known text and have a finite loss.
        entropy, measured: the entropy where it and the loss are finite, and whether it is (bool).
    """

    def __init__(self, values: TokenValues, dtype: torch.dtype) -> None:
        self.losses: Tensor = values.losses.detach()
        self.mask: Tensor = as_bool(values.mask)
        self.nonfinite = self.correct = self.judged = None
        self.weight = self.weighted_nll = self.nonfinite_weight = None
        self.text_bytes = self.text_chars = self.text_nll = self.entropy = self.measured = None
        finite, counted = self.losses, self.mask
        # On the host, one look at the sum shows whether all losses are finite.
        if not can_read(finite) or not math.isfinite(finite.sum().item()):
            finite = finite.nan_to_num(nan=0, posinf=0, neginf=0)
            self.nonfinite = (self.losses != finite) & self.mask
            counted = self.mask & ~self.nonfinite
        # A product with bytes is much faster than `where`.
        self.nll: Tensor = (finite * _as_numbers(self.mask)).to(dtype)
        if values.correct is not None:
            self.correct, self.judged = as_bool(values.correct) & self.mask, self.mask
        if values.weights is not None:
            weights = values.weights.detach().to(dtype)
            weighed = counted & (weights.abs() < torch.inf)
            self.weight = weights.where(weighed, 0)
            self.weighted_nll = self.weight * self.nll
            self.nonfinite_weight = counted ^ weighed
        if values.num_bytes is not None and values.num_chars is not None:
            num_bytes = values.num_bytes * counted
            self.text_nll = self.nll * (num_bytes > 0)
            self.text_bytes = num_bytes.to(dtype)
            self.text_chars = (values.num_chars * counted).to(dtype)
        if values.entropy is not None:
            self.measured = counted & values.entropy.isfinite()
            self.entropy = values.entropy.to(dtype).where(self.measured, 0)

    def column(self, column: Column) -> Tensor | None:
        """The values of one column at the supervised positions, 0 elsewhere."""
        found = _values_of(self, column.per_token)
        if found is None or isinstance(column.per_token, str):
            return found
        _check_values(column, found, self.mask.shape)
        return found & self.mask if found.dtype == torch.bool else found.where(self.mask, 0)


class SequenceView(NamedTuple):
    """The sequences as columns read them.

    Attributes:
        lengths: int64 [N], positions per sequence, padding included.
        sums: {column: [N]}, the sums of the token columns.
        reference: float64 [N, 2], nll and tokens of a reference model; None if there is none.
    """

    lengths: Tensor
    sums: dict[str, Tensor]
    reference: Tensor | None = None

    @property
    def filled(self) -> Tensor:
        """bool [N]: whether a sequence has any position."""
        return self.lengths > 0


def sequence_sums(
    values: TokenValues | TokenView,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype = torch.float64,
    columns: Sequence[Column] | None = None,
    reference: Tensor | None = None,
) -> dict[str, Tensor]:
    """The sums of each sequence.

    Args:
        values: of one micro-batch; a view of them has its own dtype.
        cu_seqlens: int32 [N + 1]. Without it, each row of [B, S] is one sequence, and [T] is one
            sequence.
        dtype: of the sums.
        columns: by default the registered ones that are not optional. A column for which this
            micro-batch has no values is left out.
        reference: float64 [N, 2], nll and tokens of a reference model; NaN if not known.

    Returns:
        {column: [N + 1]}. The last entry holds the tokens past the last bound. Without cu_seqlens
        there are none, and the sums are [N].

    Raises:
        ChannelMetricsError: a column gave values of the wrong shape.
    """
    columns = _always() if columns is None else columns
    view = values if isinstance(values, TokenView) else TokenView(values, dtype)
    dtype = view.nll.dtype
    of_tokens = _token_columns(view, columns)
    if cu_seqlens is None:
        shape = view.losses.shape if view.losses.dim() == 2 else (1, *view.losses.shape)
        lengths = view.losses.new_full(shape[:1], shape[1], dtype=torch.int64)
        sums = _row_sums(of_tokens, shape, dtype)
    else:
        bounds = torch.nn.functional.pad(cu_seqlens, (0, 1), value=view.losses.numel())
        lengths = bounds.diff().long()
        sums = _segment_sums(of_tokens, bounds, lengths, dtype)
        # The tokens past the last bound are no sequence, so their length is 0.
        lengths = torch.nn.functional.pad(lengths[:-1], (0, 1))
        if reference is not None:
            reference = torch.nn.functional.pad(reference, (0, 0, 0, 1), value=torch.nan)
    of_sequences = SequenceView(lengths, sums, reference)
    for column in columns:
        found = _values_of(of_sequences, column.per_sequence)
        if found is not None:
            _check_values(column, found, lengths.shape)
            sums[column.name] = found.to(dtype)
    return sums


def token_sums(
    values: TokenValues | TokenView,
    dtype: torch.dtype = torch.float64,
    columns: Sequence[Column] | None = None,
) -> dict[str, Tensor]:
    """{column: [T]}: the values of each token, to be added up by an id per token.

    It is for shards of rows and for labels of tokens. Columns of sequences are left out.

    Args:
        values: of one micro-batch; a view of them has its own dtype.
        dtype: of the values.
        columns: by default the registered ones that are not optional.
    """
    view = values if isinstance(values, TokenView) else TokenView(values, dtype)
    found = _token_columns(view, _always() if columns is None else columns)
    return {name: _as_numbers(one).flatten().to(view.nll.dtype) for name, one in found.items()}


def _always() -> list[Column]:
    return [column for column in TOKENS.columns if not column.optional]


def _values_of(view: Any, way: str | Callable[[Any], Tensor | None] | None) -> Tensor | None:
    if way is None or callable(way):
        return None if way is None else way(view)
    found: Tensor | None = getattr(view, way)
    return found


def _check_values(column: Column, values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise ChannelMetricsError(
            f"column {column.name!r} must give values of shape {list(shape)}, but gave "
            f"{list(values.shape)}; return one value per token, or per sequence."
        )


def _token_columns(view: TokenView, columns: Sequence[Column]) -> dict[str, Tensor]:
    found = ((column.name, view.column(column)) for column in columns)
    return {name: values for name, values in found if values is not None}


def _row_sums(
    columns: dict[str, Tensor], shape: Sequence[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """{column: [B]}: every row of `shape` [B, S] is one sequence."""

    def added(column: Tensor) -> Tensor:
        return column.reshape(*shape).sum(-1, dtype=dtype)

    def counted(stacked: Tensor) -> Tensor:
        return stacked.view(len(stacked), *shape).sum(-1, dtype=torch.int32)

    return _each_once(columns, added, counted, dtype)


def _segment_sums(
    columns: dict[str, Tensor], bounds: Tensor, lengths: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """{column: [N]}: sums between `bounds` [N + 1], the last of which is T, of segments [N]."""

    def added(column: Tensor) -> Tensor:
        # unsafe=True skips a check of the lengths that would wait for the device.
        return torch.segment_reduce(
            column.flatten().to(dtype), "sum", lengths=lengths, unsafe=True, initial=0
        )

    def counted(stacked: Tensor) -> Tensor:
        # A running sum takes half the time. It is exact for whole numbers only.
        running = torch.nn.functional.pad(stacked.flatten(1), (1, 0)).cumsum(1)
        return running.index_select(1, bounds).diff()

    return _each_once(columns, added, counted, dtype)


def _each_once(
    columns: dict[str, Tensor],
    added: Callable[[Tensor], Tensor],
    counted: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """{column: its sums}. Columns that share a tensor (`tokens`, `judged`) are summed once.

    added: the sums of one column. counted: those of columns of 0 and 1, [P, T] or [P, B, S].
    """
    alone = {id(column): column for column in columns.values()}
    bools = [key for key, column in alone.items() if column.dtype == torch.bool]
    sums = {key: added(column) for key, column in alone.items() if key not in bools}
    if bools:
        stacked = torch.stack([_as_numbers(alone[key]) for key in bools])
        sums |= dict(zip(bools, counted(stacked).to(dtype), strict=True))
    return {name: sums[id(column)] for name, column in columns.items()}


def _as_numbers(values: Tensor) -> Tensor:
    """Bools as bytes of 0 and 1, which are much faster to add up."""
    return values.view(torch.uint8) if values.dtype == torch.bool else values
