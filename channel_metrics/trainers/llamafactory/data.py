"""The dataset column `channel`, which LLaMA-Factory's preprocessing would drop.

A converter adds it to each record. A processor then makes rows of records: it may drop records,
pack them in another order, or cut them. So the first tokens of each record know its channel while
the rows are made (Python's lists keep the objects), and the channels are read from the rows.

A row of one sequence has a name. A row of several has a list of names, and the column
`channel_lengths`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import llamafactory
from llamafactory.data.processor import (
    PackedSupervisedDatasetProcessor,
    PretrainDatasetProcessor,
)

from channel_metrics import swap
from channel_metrics.core.labels import channel_of
from channel_metrics.errors import UnsupportedVersionError

__all__ = ["CHANNEL", "LENGTHS", "ChannelProcessor", "converted"]

CHANNEL, LENGTHS = "channel", "channel_lengths"

# {column: one list per record, or per row}
Columns = MutableMapping[str, list[Any]]


def converted(
    convert: Callable[[Any], dict[str, Any]],
    name: str,
    fields: Sequence[str],
    classes: Mapping[str, Sequence[str]],
    example: Any,
) -> dict[str, Any]:
    """Convert one record, and add its channel.

    Args:
        convert: LLaMA-Factory's converter.
        name: of the dataset. It is the channel of records that have none of `fields`.
        fields, classes: see `channel_metrics.core.labels.channel_of`.
        example: the record.
    """
    return {**convert(example), CHANNEL: channel_of(example, fields, classes, name)}


@dataclass(frozen=True, eq=False)
class _Record:
    channel: str


class _Token(int):
    """A token id that knows its record, and its place in it."""

    record: _Record
    place: int


def _mark(ids: list[int], channel: str) -> None:
    """Let the first two tokens know a record. LLaMA-Factory may overwrite the first of a row."""
    record = _Record(channel)
    for place, token in enumerate(ids[:2]):
        ids[place] = marked = _Token(token)
        marked.record, marked.place = record, place


@dataclass
class ChannelProcessor:
    """A dataset processor of LLaMA-Factory whose rows keep the channels of their records."""

    inner: Any

    def print_data_example(self, example: Any) -> None:
        self.inner.print_data_example(example)

    def preprocess_dataset(self, examples: Mapping[str, list[Any]]) -> Columns:
        """Make rows of records, and add our columns."""
        records = {key: examples[key] for key in examples}
        cut = isinstance(self.inner, PretrainDatasetProcessor)
        owner, name, body = self._marking_texts(records) if cut else self._marking(records)
        with swap.wrapped(owner, name, body):
            made: Columns = self.inner.preprocess_dataset(records)
        if not made:
            return made
        rows = made["input_ids" if "input_ids" in made else "chosen_input_ids"]
        parts = self._parts(rows, cut=cut)
        if cut or isinstance(self.inner, PackedSupervisedDatasetProcessor):
            made[CHANNEL] = [[record.channel for record, _ in part] for part in parts]
            made[LENGTHS] = [[length for _, length in part] for part in parts]
        else:
            made[CHANNEL] = [part[0][0].channel if part else None for part in parts]
        return made

    def _marking(self, records: Columns) -> tuple[Any, str, Any]:
        # LLaMA-Factory encodes each record that it keeps, and passes its own list of messages on.
        names = dict(zip(map(id, records["_prompt"]), records[CHANNEL], strict=True))

        def encode(original: Any, *args: Any, prompt: Any, **kwargs: Any) -> Any:
            encoded = original(*args, prompt=prompt, **kwargs)
            _mark(encoded[0], names[id(prompt)])
            return encoded

        return self.inner, "_encode_data_example", encode

    def _marking_texts(self, records: Columns) -> tuple[Any, str, Any]:
        def tokenize(original: Any, *args: Any, **kwargs: Any) -> Any:
            encoded = original(*args, **kwargs)
            for ids, channel in zip(encoded["input_ids"], records[CHANNEL], strict=True):
                _mark(ids, channel)
            return encoded

        return type(self.inner.tokenizer), "__call__", tokenize

    def _parts(self, rows: list[list[int]], *, cut: bool) -> list[list[tuple[_Record, int]]]:
        """For each row, its records and how many tokens of each it has; padding is at the end.

        cut: whether a row may begin with the rest of the last record of the row before.
        """
        found: list[list[tuple[_Record, int]]] = []
        record: _Record | None = None
        for row in rows:
            starts: list[tuple[_Record, int]] = [(record, 0)] if cut and record else []
            for place, token in enumerate(row):
                if isinstance(token, _Token):
                    row[place] = int(token)
                    if token.record is not record:
                        record = token.record
                        start = place - token.place
                        starts = [*starts, (record, start)] if start else [(record, 0)]
            self._check(bool(starts) or not row)
            ends = [*(place for _, place in starts[1:]), len(row)]
            found.append(
                [(of, end - place) for (of, place), end in zip(starts, ends, strict=False)]
            )
        return found

    def _check(self, known: bool) -> None:
        if not known:
            raise UnsupportedVersionError(
                f"the rows of LLaMA-Factory's {type(self.inner).__name__} cannot be matched with "
                f"their records: llamafactory {llamafactory.__version__} makes them in another way "
                "than 0.9.5; use 0.9.5, or leave the patch out."
            )
