"""Finds which record each sequence of a batch holds: collators may sort, drop or replace them.

>>> tokens = [torch.tensor([3, 4, 5]), torch.tensor([1, 2])]
>>> matched_records([(row, None) for row in tokens], tokens[::-1])
([1, 0], True)

The functions change no argument and read values, so call them on the host. A batch in order costs
one comparison per record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from channel_metrics.core.boundaries import Boundaries

__all__ = ["Span", "matched_records", "tokens_of_records", "tokens_of_spans"]

# Where a record's tokens begin and end in the flattened token axis.
Span = tuple[int, int]
# The tokens of a sequence without padding, and the labels at the same positions.
Sequence_ = tuple[Tensor, Tensor | None]

# If a collator edits a record, at least this share of its tokens must stay.
_MOST = 0.75


def tokens_of_records(records: Sequence[Mapping[str, Any]]) -> list[Tensor] | None:
    """The `input_ids` of each record, int64 [n]; None if one has none that are integers."""
    found = []
    for record in records:
        try:
            tokens = torch.as_tensor(record["input_ids"], device="cpu")
        except (KeyError, TypeError, ValueError, RuntimeError):
            return None
        if tokens.dim() != 1 or tokens.is_floating_point():
            return None
        found.append(tokens.long())
    return found


def tokens_of_spans(
    batch: Mapping[str, Any], boundaries: Boundaries, spans: Sequence[Span]
) -> list[Sequence_] | None:
    """The tokens in each span of the batch, without padding.

    Args:
        batch: a collated batch.
        boundaries: of the batch.
        spans: where the records lie.

    Returns:
        Tokens and labels of each span; None if the `input_ids` cannot be cut at these spans.
    """
    ids, labels, mask = (batch.get(key) for key in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor):
        return None
    keep = boundaries.keep
    beside = isinstance(labels, Tensor) and labels.shape == ids.shape
    if isinstance(labels, Tensor) and not beside:
        # input_ids of an encoder and labels of a decoder differ in length: one row per record.
        if ids.dim() != 2 or ids.shape[0] != len(spans):
            return None
        spans = [(row * ids.shape[1], (row + 1) * ids.shape[1]) for row in range(ids.shape[0])]
        same = isinstance(mask, Tensor) and mask.shape == ids.shape
        keep = mask.flatten() != 0 if same and isinstance(mask, Tensor) else None
    flat_labels = labels.flatten() if isinstance(labels, Tensor) and beside else None
    return list(_cut(ids.flatten(), flat_labels, keep, spans))


def _cut(
    ids: Tensor, labels: Tensor | None, keep: Tensor | None, spans: Sequence[Span]
) -> Iterator[Sequence_]:
    for start, end in spans:
        kept = slice(None) if keep is None else keep[start:end]
        yield ids[start:end][kept], None if labels is None else labels[start:end][kept]


def matched_records(
    sequences: Sequence[Sequence_], records: Sequence[Tensor]
) -> tuple[list[int | None], bool]:
    """Find the record whose tokens each sequence holds.

    A sequence may be a record that was cut or continued on one side. Tokens that a masked language
    model hides are read from the labels.

    Args:
        sequences: tokens and labels, see `tokens_of_spans`.
        records: the tokens of as many records, see `tokens_of_records`.

    Returns:
        The number of the record for each sequence, None if no record fits; and whether any
        sequence holds unchanged tokens of a record. If none does, the collator makes other tokens,
        and the order cannot be seen.
    """
    own = [_fit(sequence, tokens) for sequence, tokens in zip(sequences, records, strict=True)]
    if all(fit is not None and fit.in_place for fit in own):
        return list(range(len(records))), True
    equal = [fit is not None and fit.equal for fit in own]
    found: list[int | None] = [i if same else None for i, same in enumerate(equal)]
    open_ = [i for i, number in enumerate(found) if number is None]
    fits = {(i, j): _fit(sequences[i], records[j]) for i in open_ for j in open_}
    # Equal ones first, then the longest overlap: a record may be the beginning of another.
    best = sorted(
        (not fit.equal, -fit.size, i != j, i, j) for (i, j), fit in fits.items() if fit is not None
    )
    free = set(open_)
    for *_, i, j in best:
        if found[i] is None and j in free:
            found[i] = j
            free.remove(j)
    exact = any(number is not None for number in found)
    # A collator may also change a few tokens (noise, placeholders) of a record in its place.
    for i in open_:
        if found[i] is None and i in free and _edited(sequences[i][0], records[i]):
            found[i] = i
    return found, exact


class _Fit(NamedTuple):
    """A sequence and a record agree on `size` tokens, from the left or from the right."""

    equal: bool
    size: int
    in_place: bool
    """Whether the rest of the sequence is one token repeated, such as a pad."""


def _fit(sequence: Sequence_, record: Tensor) -> _Fit | None:
    tokens, labels = sequence
    size = min(len(tokens), len(record))
    if len(tokens) == len(record):
        return _Fit(True, size, True) if _same(tokens, labels, record, slice(None)) else None
    if size == 0:
        return _Fit(False, 0, True)
    for part, rest in ((slice(size), tokens[size:]), (slice(-size, None), tokens[:-size])):
        if _same(tokens, labels, record, part):
            return _Fit(False, size, bool((rest == rest[:1]).all()))
    return None


def _same(tokens: Tensor, labels: Tensor | None, record: Tensor, part: slice) -> bool:
    same = tokens[part] == record[part]
    return bool((same if labels is None else same | (labels[part] == record[part])).all())


def _edited(tokens: Tensor, record: Tensor) -> bool:
    """Whether most tokens are unchanged, apart from tokens put in or left out at one place."""
    size = min(len(tokens), len(record))
    if len(tokens) == len(record):
        kept = int((tokens == record).sum())
    else:
        head = (tokens[:size] == record[:size]).long().cumprod(0)
        tail = (tokens.flip(0)[:size] == record.flip(0)[:size]).long().cumprod(0)
        kept = min(int(head.sum() + tail.sum()), size)
    return kept >= _MOST * size
