"""Matches channels to the sequences of a batch: by rows, by boundaries, or by tokens.

Letters: R records, B rows, S row length, T = num_tokens, N = num_sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby, pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.boundaries import Boundaries
from channel_metrics.core.checks import IGNORE_INDEX, check_ids
from channel_metrics.core.labels import LabelTable, channels_of
from channel_metrics.data.record_order import Span
from channel_metrics.errors import ChannelError

__all__ = [
    "WHOLE_KEY",
    "as_record",
    "has_channel_per_token",
    "names_per_run",
    "names_per_sequence",
    "own_channels",
    "rows_of",
    "spans_of_records",
    "without_pads",
]

# The batch key for the bounds of whole sequences, if there are those of the runs of one channel.
WHOLE_KEY = "channel_whole_bounds"
# For each record the channels that it lists: one, one per packed sequence, or one per token.
Names = list[list[str | None]]


def rows_of(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(B, S) of the labels, else of the input_ids; (0, 0) if the batch has neither."""
    for key in ("labels", "input_ids"):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() > 0:
            return (value.shape[0], value.shape[1]) if value.dim() > 1 else (1, value.shape[0])
    return 0, 0


def own_channels(channels: Any, table: LabelTable | None) -> Names:
    """The channels that a collator returned itself, as one list of one name per sequence.

    Args:
        channels: a list of names, or int64 ids [N].
        table: the label table of the ids.

    Raises:
        ChannelError: `channels` has another form, or ids have no table or are not in it.
    """
    if isinstance(channels, Tensor) and channels.dim() == 1 and not channels.is_floating_point():
        if table is None:
            raise ChannelError(
                "the collator returned `channels` as ids, but no table says what they mean; "
                "return names, or declare `channels` in the metrics config."
            )
        check_ids(channels.cpu(), len(table))
        return [[None if i < 0 else table.names[i]] for i in channels.tolist()]
    if isinstance(channels, (list, tuple)):
        return [[name] for name in channels_of({"channels": channels}, ("channels",))]
    came = list(channels.shape) if isinstance(channels, Tensor) else type(channels).__name__
    raise ChannelError(
        "a collator that returns `channels` itself must give a list of names or int64 ids "
        f"[num_sequences], one per sequence, but gave {came}; if it means something else, "
        "rename that key."
    )


def without_pads(boundaries: Boundaries, num_names: int, batch: Mapping[str, Any]) -> Boundaries:
    """The boundaries without pads that look like sequences, because their positions start anew.

    TRL pads a padding-free row to a multiple with pads of position 0, each like a sequence of one
    token. Axolotl pads rows with positions 0, 1, 2 ..., like one more sequence. They are pads if
    they are more than the names, not supervised, and all one token.

    Args:
        boundaries: those that the batch gives.
        num_names: how many sequences have a channel.
        batch: a collated batch.
    """
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if boundaries.num_sequences <= num_names or not isinstance(labels, Tensor):
        return boundaries
    num_rows, row_length = rows_of(batch)
    tail = boundaries.cu_seqlens[num_names:]
    pads = labels.flatten()[int(tail[0]) : int(tail[-1])]
    if num_rows == 1 and bool((tail.diff() == 1).all() & (pads == IGNORE_INDEX).all()):
        return Boundaries(boundaries.cu_seqlens[: num_names + 1], boundaries.keep)
    if num_rows != num_names or not isinstance(ids, Tensor) or ids.shape != labels.shape:
        return boundaries
    bounds = boundaries.cu_seqlens.tolist()
    keep = torch.ones(labels.numel(), dtype=torch.bool, device="cpu")
    for start, end in _pads_of_rows(tuple(bounds), row_length, labels, ids):
        keep[start:end] = False
        bounds.remove(end if start % row_length == 0 else start)
    found = torch.tensor(bounds, dtype=torch.int32, device="cpu")
    return Boundaries(found, keep if boundaries.keep is None else keep & boundaries.keep.cpu())


def _pads_of_rows(
    bounds: Sequence[int], row_length: int, labels: Tensor, ids: Tensor
) -> Iterator[Span]:
    """The sequences at the ends of rows that are not supervised and hold one token only."""

    def is_pad(span: Span) -> bool:
        tokens, targets = (of.flatten()[slice(*span)] for of in (ids, labels))
        alike = (tokens == tokens[:1]).all() & (targets == IGNORE_INDEX).all()
        return len(tokens) > 0 and bool(alike)

    for _, of_row in groupby(pairwise(bounds), lambda span: span[0] // row_length):
        spans = list(of_row)
        if not all(map(is_pad, spans)):
            yield from takewhile(is_pad, spans)
            yield from takewhile(is_pad, reversed(spans))


def spans_of_records(
    counts: Sequence[int], boundaries: Boundaries, batch: Mapping[str, Any]
) -> list[Span] | None:
    """Where each record lies in the token axis: it is a row, a sequence, or several sequences.

    Args:
        counts: how many sequences each record should give.
        boundaries: of the batch.
        batch: a collated batch.

    Returns:
        One span per record; None if the counts fit neither rows nor sequences.
    """
    num_rows, row_length = rows_of(batch)
    bounds = [int(bound) for bound in boundaries.cu_seqlens.tolist()]
    if len(counts) == num_rows:
        return [(row * row_length, (row + 1) * row_length) for row in range(num_rows)]
    if len(counts) == len(bounds) - 1:
        return list(pairwise(bounds))
    if sum(counts) == len(bounds) - 1:
        return list(pairwise(bounds[end] for end in accumulate(counts, initial=0)))
    return None


def names_per_sequence(
    channels: Names, boundaries: Boundaries, batch: Mapping[str, Any]
) -> list[str | None]:
    """The channel of each sequence, [N].

    Args:
        channels: those that each of R records lists.
        boundaries: of the batch.
        batch: a collated batch.

    Raises:
        ChannelError: the number of channels does not fit the number of sequences.
    """
    names = [name for of_record in channels for name in of_record]
    held = boundaries.num_sequences
    counts = _sequences_per_row(boundaries, batch)
    by_row = len(channels) == len(counts)
    if by_row:
        # Each record is one row. It has one channel for all its sequences, or one for each of them.
        rows = [c * n if len(c) == 1 else c for c, n in zip(channels, counts, strict=True)]
        if [len(row) for row in rows] == counts:
            return [name for row in rows for name in row]
    # An empty sequence between two rows may belong to either of them.
    certain = by_row and bool((boundaries.cu_seqlens.diff() > 0).all())
    if len(names) == held and not certain:
        return names
    if all(name is None for name in names):
        return [None] * held
    per_row = f"{[len(c) for c in channels]} against {counts} per row, " if by_row else ""
    raise ChannelError(
        f"the records name {len(names)} channels but the batch holds {held} sequences "
        f"({per_row}boundaries {boundaries.cu_seqlens[:8].tolist()}{'...' if held > 7 else ''}); "
        "a packer must keep one channel per sequence, in order, and a collator that drops or "
        "adds records must return `channels` itself."
    )


def has_channel_per_token(record: Mapping[str, Any], channels: Sequence[Any]) -> bool:
    """Whether a record lists one channel for each of its tokens, as blocks of mixed texts do."""
    tokens: Any = record.get("input_ids", ())
    return len(channels) > 1 and hasattr(tokens, "__len__") and len(tokens) == len(channels)


def names_per_run(
    channels: Names, spans: Sequence[Span], boundaries: Boundaries
) -> tuple[list[str | None], Boundaries]:
    """Cut records with a channel per token into sequences: each run of one channel is one.

    Args:
        channels: for each record one per token, or one for all its tokens.
        spans: where the records lie.
        boundaries: of the batch; all of them are kept.

    Returns:
        The channel of each new sequence, and the new boundaries.

    Raises:
        ChannelError: a record lists more or fewer channels than its tokens in the batch.
    """
    numbers = {name: i for i, name in enumerate({name for c in channels for name in c})}
    size = int(boundaries.cu_seqlens[-1])
    owner = torch.zeros(size, dtype=torch.int64, device="cpu")
    starts = torch.zeros(size, dtype=torch.bool, device="cpu")
    starts[[bound for bound in boundaries.cu_seqlens.tolist() if bound < size]] = True
    for of_record, (start, end) in zip(channels, spans, strict=True):
        keep = torch.ones(end - start, device="cpu")
        if boundaries.keep is not None:
            keep = boundaries.keep[start:end]
        ids = torch.tensor([numbers[name] for name in of_record], device="cpu")
        kept = int(keep.sum())
        if len(ids) not in (1, kept):
            raise ChannelError(
                f"a record lists a channel for each of its {len(ids)} tokens, but the batch holds "
                f"{kept} of them; cut or pad records and their channels in the dataset, before "
                "the collator."
            )
        # A pad belongs to the token before it, or to the first one.
        at = (keep.cumsum(0).long() - 1).clamp(min=0, max=len(ids) - 1)
        owner[start:end] = ids[at]
    starts[1:] |= owner[1:] != owner[:-1]
    bounds = starts.nonzero().flatten()
    names = list(numbers)
    ends = torch.cat([bounds, bounds.new_tensor([size])]).to(torch.int32)
    return [names[i] for i in owner[bounds].tolist()], Boundaries(ends, boundaries.keep)


def _sequences_per_row(boundaries: Boundaries, batch: Mapping[str, Any]) -> list[int]:
    num_rows, row_length = rows_of(batch)
    if not num_rows or not row_length:
        return []
    rows = (boundaries.cu_seqlens[:-1].long() // row_length).clamp(max=num_rows - 1)
    counts: list[int] = torch.bincount(rows, minlength=num_rows).tolist()
    return counts


def as_record(feature: Any) -> Mapping[str, Any]:
    """A feature as a mapping; raises `ChannelError` if it has no attributes to read."""
    if isinstance(feature, Mapping):
        return feature
    if not hasattr(feature, "__dict__"):
        raise ChannelError(
            "a record must be a mapping or an object with attributes to have a channel, but is "
            f"{type(feature).__name__}; return a dict from the dataset."
        )
    record: Mapping[str, Any] = vars(feature)
    return record
