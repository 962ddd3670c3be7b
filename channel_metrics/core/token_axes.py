"""Axes whose labels belong to single tokens, and not to records: position, length, role.

    axes:
      position: {by: position}
      length: {by: length}
      role: {by: token, field: roles}

The sums of their labels are rows of the same table as those of channels, so they are added up over
steps and ranks as these are. A row of a token axis holds the tokens once more, and belongs to no
channel. Values that need whole sequences, such as `samples`, are left out for them.

>>> [bucket_name(number) for number in (0, 1, 2, 8)]
['0000000', '0000001', '0000002-0000003', '0000128-0000255']

Letters: B rows, S row length, T = num_tokens, N = num_sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from channel_metrics.core.axis_settings import LENGTH, POSITION, TOKEN, Source, token_source
from channel_metrics.core.cu_seqlens import sequence_index
from channel_metrics.core.labels import UNLABELED, LabelTable
from channel_metrics.core.names import token_name
from channel_metrics.errors import ChannelError

__all__ = [
    "NUM_BUCKETS",
    "Places",
    "TokenAxes",
    "bucket_name",
    "buckets",
    "places",
    "places_of_positions",
]

# 0, 1, 2 to 3, 4 to 7, ..., and one for all from 2**20 on.
NUM_BUCKETS = 22

# A field of the records, and the mark of each of its labels.
TokenColumn = tuple[str, Mapping[Any, int]]


class Places(NamedTuple):
    """Where each token stands. All tensors are int64, in one shape.

    Attributes:
        positions: how many tokens of its sequence are before it; -1 if it is in no sequence.
        lengths: how many tokens its sequence has; -1 if it is in no sequence.
        marks: its labels from columns of the records, see `TokenAxes.columns`; None without them.
    """

    positions: Tensor
    lengths: Tensor
    marks: Tensor | None = None

    def map(self, moved: Callable[[Tensor], Tensor]) -> Places:
        """The places after `moved` was applied to each tensor."""
        return Places(*(None if one is None else moved(one) for one in self))

    def of_next(self) -> Places:
        """At each position the place of the next token of its row, which it predicts."""
        after = self.positions[..., -1:]
        last = Places(after + (after >= 0), self.lengths[..., -1:])
        pairs = zip(self[:2], last[:2], strict=True)
        return Places(*(torch.cat([one[..., 1:], end], dim=-1) for one, end in pairs))


class TokenAxes:
    """The token axes of a session.

    Args:
        axes: all axes of the config. Others than those `by` something are left aside.
    """

    def __init__(self, axes: Mapping[str, Source]) -> None:
        self._sources: dict[str, Mapping[str, Any]] = {
            axis: one
            for axis, one in axes.items()
            if isinstance(one, Mapping) and token_source(one)
        }
        self._shifts = {axis: 8 * i for i, axis in enumerate(self._by(TOKEN))}
        # {device: the ids of each axis}
        self._ids: dict[torch.device, dict[str, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    @property
    def of_places(self) -> list[str]:
        """The axes that need to know where a token stands."""
        return self._by(POSITION, LENGTH)

    @property
    def columns(self) -> list[TokenColumn]:
        """For each axis from a column of the records: the field, and the mark of each label.

        Each axis has 8 bits of the marks of a token. 0 there stands for no label.
        """
        found = []
        for axis, shift in self._shifts.items():
            source, names = self._sources[axis], self._labels(axis)
            marks = {v: (names.index(name) + 1) << shift for v, name in source["labels"].items()}
            found.append((source["field"], marks))
        return found

    def names(self, axis: str) -> list[str]:
        """What the rows of an axis are called in a label table. The last one is `unlabeled`."""
        return [token_name(axis, label) for label in (*self._labels(axis), UNLABELED)]

    def groups(self, labels: LabelTable, found: Places | None) -> list[Tensor]:
        """For each axis the ids of the tokens, int64 in their shape. Nothing waits for the device.

        Args:
            labels: the table of the ids. The names of the axes join it.
            found: where the tokens stand; None if that is not known.

        Raises:
            ChannelError: an axis is read from a column that the batch does not have.
        """
        if self._shifts and (found is None or found.marks is None):
            fields = ", ".join(field for field, _ in self.columns)
            raise ChannelError(
                f"the axes {', '.join(self._shifts)} need the labels of the tokens ({fields}), but "
                "the batch does not have them: they come with `metrics.collator`, where the "
                "trainer neither tokenizes nor packs nor cuts records. Take them out of `axes`."
            )
        if found is None:
            return []
        device = found.positions.device
        if device not in self._ids:
            self._ids[device] = {
                axis: torch.tensor(labels.add_all(self.names(axis)), device=device) for axis in self
            }
        return [self._ids[device][axis][self._indices(axis, found)] for axis in self]

    def _indices(self, axis: str, found: Places) -> Tensor:
        """The number of the label of each token; -1 for none, which is the last row."""
        if axis in self._shifts:
            assert found.marks is not None
            return (found.marks >> self._shifts[axis] & 255) - 1
        by_position = self._sources[axis] == {"by": POSITION}
        return buckets(found.positions if by_position else found.lengths)

    def _by(self, *kinds: str) -> list[str]:
        return [axis for axis, one in self._sources.items() if token_source(one) in kinds]

    def _labels(self, axis: str) -> list[str]:
        if token_source(self._sources[axis]) == TOKEN:
            return list(dict.fromkeys(self._sources[axis]["labels"].values()))
        return [bucket_name(number) for number in range(NUM_BUCKETS)]


def places(
    shape: torch.Size, cu_seqlens: Tensor | None, keep: Tensor | None, like: Tensor
) -> Places:
    """Where each token stands in its sequence. Shapes are static, and nothing waits for the device.

    Args:
        shape: [T] or [B, S].
        cu_seqlens: int32 [N + 1] over the flattened token axis. Without it, each row of [B, S] is
            one sequence, and [T] is one sequence.
        keep: bool of this shape, False at pad positions, which are not counted. None: no pads.
        like: a tensor on the device of the result.

    Returns:
        In the shape `shape`. A pad has the place of the token before it.
    """
    size, device = shape.numel(), like.device
    if cu_seqlens is None:
        rows = shape[0] if len(shape) == 2 else 1
        bounds = torch.arange(rows + 1, device=device) * shape[-1]
    else:
        bounds = cu_seqlens.to(device, non_blocking=True).long()
    kept = torch.arange(size + 1, device=device)
    if keep is not None:
        counts = keep.to(device, non_blocking=True).flatten().long().cumsum(0)
        kept = torch.nn.functional.pad(counts, (1, 0))
    before = kept[bounds]
    owner = sequence_index(bounds, size)
    # The tokens past the last bound belong to no sequence.
    starts = torch.nn.functional.pad(before[:-1], (0, 1))
    lengths = torch.nn.functional.pad(before.diff(), (0, 1), value=-1)
    positions = (kept[1:] - 1 - starts[owner]).clamp(min=0)
    outside = owner == len(bounds) - 1
    return Places(positions.masked_fill(outside, -1).view(shape), lengths[owner].view(shape))


def places_of_positions(position_ids: Tensor) -> Places:
    """Where each token stands, if positions [B, S] count up in a sequence and restart in the next.

    Nothing waits for the device.
    """
    flat = position_ids.flatten().long()
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff() != 1
    owner = starts.flatten().long().cumsum(0) - 1
    lengths = torch.zeros_like(flat).scatter_add_(0, owner, torch.ones_like(flat))[owner]
    at = torch.arange(len(flat), device=flat.device)
    positions = (
        at - torch.zeros_like(flat).scatter_reduce_(0, owner, at, "amin", include_self=False)[owner]
    )
    return Places(positions, lengths).map(lambda one: one.view(position_ids.shape))


def buckets(values: Tensor) -> Tensor:
    """int64: the number of the bucket of each value; -1 for negative ones."""
    # 2**e is in the bucket e + 1. The exponent of a float is that number, and that of 0 is 0.
    exponents = torch.frexp(values.float()).exponent.long().clamp(max=NUM_BUCKETS - 1)
    return exponents.masked_fill(values < 0, -1)


def bucket_name(number: int) -> str:
    """The label of a bucket: its lowest and its highest value, so that names sort as numbers."""
    low, high = (1 << number) >> 1, (1 << number) - 1
    if number == NUM_BUCKETS - 1:
        return f"{low:07}-"
    return f"{low:07}" if low >= high else f"{low:07}-{high:07}"
