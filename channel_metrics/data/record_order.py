"""Does sequence i of a batch hold the tokens of record i? Collators may sort, drop or replace.

>>> tokens = [torch.tensor([3, 4, 5]), torch.tensor([1, 2])]
>>> matched_records([(row, None) for row in tokens], tokens[::-1])
[1, 0]

Pure, and meant for the host. Both lists are short (a micro-batch), and compared only where they
differ, so a batch in order costs one comparison per record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.boundaries import Boundaries

__all__ = ["Span", "matched_records", "tokens_of_records", "tokens_of_spans"]

# Where a record's tokens begin and end in the flattened token axis.
Span = tuple[int, int]
# The tokens of a sequence without padding, and the labels at the same places.
Sequence_ = tuple[Tensor, Tensor | None]

_EQUAL, _CUT, _OTHER = 2, 1, 0


def tokens_of_records(records: Sequence[Mapping[str, Any]]) -> list[Tensor] | None:
    """`input_ids` of each record, int64 [n]; None if a record has none, or holds no numbers."""
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
    """The tokens in each span of the batch; None if its `input_ids` cannot be cut so."""
    ids, labels, mask = (batch.get(key) for key in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor):
        return None
    keep = boundaries.keep
    if ids.numel() != int(boundaries.cu_seqlens[-1]):
        # An encoder's input beside a decoder's labels: one row per record.
        if ids.dim() != 2 or ids.shape[0] != len(spans):
            return None
        spans = [(row * ids.shape[1], (row + 1) * ids.shape[1]) for row in range(ids.shape[0])]
        same = isinstance(mask, Tensor) and mask.shape == ids.shape
        keep = mask.flatten() != 0 if same and isinstance(mask, Tensor) else None
    beside = isinstance(labels, Tensor) and labels.shape == ids.shape
    flat_labels = labels.flatten() if beside and isinstance(labels, Tensor) else None
    return list(_cut(ids.flatten(), flat_labels, keep, spans))


def _cut(
    ids: Tensor, labels: Tensor | None, keep: Tensor | None, spans: Sequence[Span]
) -> Iterator[Sequence_]:
    for start, end in spans:
        kept = slice(None) if keep is None else keep[start:end]
        yield ids[start:end][kept], None if labels is None else labels[start:end][kept]


def matched_records(
    sequences: Sequence[Sequence_], records: Sequence[Tensor]
) -> list[int | None]:
    """For each sequence the number of the record whose tokens it holds; None if no record has them.

    A sequence may be a record that was cut or continued on one side. Tokens that a masked language
    model hides are read from the labels.
    """
    own = [_fit(sequence, tokens) for sequence, tokens in zip(sequences, records, strict=True)]
    found: list[int | None] = [i if fit == _EQUAL else None for i, fit in enumerate(own)]
    open_ = [i for i, fit in enumerate(own) if fit != _EQUAL]
    free = list(open_)
    # What is equal comes first: a shorter record may be how a longer one begins.
    for wanted in (_EQUAL, _CUT):
        for i in [i for i in open_ if found[i] is None]:
            fits = [j for j in free if _fit(sequences[i], records[j]) >= wanted]
            if fits:
                found[i] = i if i in fits else fits[0]
                free.remove(found[i])
    # A collator may also change a few tokens (noise, placeholders).
    for i in [i for i in open_ if found[i] is None and i in free]:
        if _edited(sequences[i][0], records[i]):
            found[i] = i
    return found


def _fit(sequence: Sequence_, record: Tensor) -> int:
    tokens, labels = sequence
    if len(tokens) == len(record):
        return _EQUAL if _same(tokens, labels, record, slice(None)) else _OTHER
    size = min(len(tokens), len(record))
    ends = (slice(None, size), slice(-size, None)) if size else (slice(0, 0),)
    return _CUT if any(_same(tokens, labels, record, end) for end in ends) else _OTHER


def _same(tokens: Tensor, labels: Tensor | None, record: Tensor, part: slice) -> bool:
    same = tokens[part] == record[part]
    return bool((same if labels is None else same | (labels[part] == record[part])).all())


def _edited(tokens: Tensor, record: Tensor) -> bool:
    """Whether half of the tokens stand where they stood, or some were put in or left out."""
    if len(tokens) == len(record):
        return int((tokens == record).sum()) * 2 >= len(record)
    short, long = sorted((tokens.tolist(), record.tolist()), key=len)
    rest = iter(long)
    return all(token in rest for token in short)
