"""The dataset column `channel`, which LLaMA-Factory's preprocessing would drop.

A converter adds it to each record, and a processor keeps it when records become rows. A row of one
sequence has a name. A row of several has a list of names, and the column `channel_lengths`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import llamafactory
from llamafactory.data.processor import (
    PackedSupervisedDatasetProcessor,
    PretrainDatasetProcessor,
)

from channel_metrics import swap
from channel_metrics.core.labels import channel_of
from channel_metrics.errors import UnsupportedVersionError

__all__ = ["CHANNEL", "LENGTHS", "ChannelProcessor", "NamedConverter"]

CHANNEL, LENGTHS = "channel", "channel_lengths"

# {column: one list per record, or per row}
Columns = MutableMapping[str, list[Any]]


@dataclass
class NamedConverter:
    """A converter of LLaMA-Factory whose records have a channel.

    Args:
        convert: the converter.
        name: of the dataset. It is the channel of records that have none of `fields`.
        fields, classes: see `channel_metrics.core.labels.channel_of`.
    """

    convert: Callable[[Any], dict[str, Any]]
    name: str
    fields: Sequence[str]
    classes: Mapping[str, Sequence[str]]

    def __call__(self, example: Any) -> dict[str, Any]:
        """Convert one record."""
        own = channel_of(example, self.fields, self.classes)
        return {**self.convert(example), CHANNEL: own or self.name}


@dataclass
class ChannelProcessor:
    """A dataset processor of LLaMA-Factory whose rows keep the channels of their records."""

    inner: Any

    def print_data_example(self, example: Any) -> None:
        self.inner.print_data_example(example)

    def preprocess_dataset(self, examples: Mapping[str, list[Any]]) -> Columns:
        """Make rows of records, and add our columns."""
        records = {key: examples[key] for key in examples}
        if isinstance(self.inner, PretrainDatasetProcessor):
            return self._of_texts(records)
        made, kept = self._encoded(records)
        if not made:
            return made
        if isinstance(self.inner, PackedSupervisedDatasetProcessor):
            return self._with_parts(made, self._packs(made, kept))
        made[CHANNEL] = [name for name, _ in kept]
        self._check(all(len(column) == len(kept) for column in made.values()))
        return made

    def _encoded(self, records: dict[str, list[Any]]) -> tuple[Columns, list[Any]]:
        """The rows, and (channel, token ids) of each record that was not dropped."""
        # LLaMA-Factory encodes each record that it keeps, and passes its own list of messages on.
        names = dict(zip(map(id, records["_prompt"]), records[CHANNEL], strict=True))
        kept = []

        def encode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            encoded = original(*args, **kwargs)
            prompt = id(kwargs.get("prompt"))
            self._check(prompt in names)
            kept.append((names[prompt], encoded[0]))
            return encoded

        with swap.wrapped(self.inner, "_encode_data_example", encode):
            return self.inner.preprocess_dataset(records), kept

    def _packs(self, made: Columns, kept: list[Any]) -> list[Any]:
        """(channels, lengths) of each pack: LLaMA-Factory takes the last record of a length."""
        stacks = defaultdict(list)
        for name, ids in kept:
            stacks[len(ids)].append((name, ids))
        packs = []
        for row, positions in zip(made["input_ids"], made["position_ids"], strict=True):
            starts = [i for i, position in enumerate(positions) if position == 0]
            names, lengths = [], []
            for start, end in pairwise([*starts, len(row)]):
                stack = stacks[end - start]
                if not stack or stack[-1][1] != row[start:end]:
                    break  # the padding at the end
                names.append(stack.pop()[0])
                lengths.append(end - start)
            packs.append((names, lengths))
        # What is too long was dropped.
        longest = self.inner.data_args.cutoff_len
        self._check(not any(stacks[length] for length in stacks if 0 < length <= longest))
        return packs

    def _of_texts(self, records: dict[str, list[Any]]) -> Columns:
        """Stage pt: one row per text, or blocks of one length that are cut from all texts."""
        recording = _Recording(self.inner.tokenizer)
        self.inner.tokenizer = recording
        try:
            made: Columns = self.inner.preprocess_dataset(records)
        finally:
            self.inner.tokenizer = recording.tokenizer
        self._check(len(recording.lengths) == len(records[CHANNEL]))
        if not self.inner.data_args.packing:
            made[CHANNEL] = records[CHANNEL]
            return made
        size = self.inner.data_args.cutoff_len
        return self._with_parts(made, _blocks(records[CHANNEL], recording.lengths, size))

    def _with_parts(self, made: Columns, parts: list[Any]) -> Columns:
        self._check(len(made["input_ids"]) == len(parts))
        made[CHANNEL] = [names for names, _ in parts]
        made[LENGTHS] = [lengths for _, lengths in parts]
        return made

    def _check(self, fits: bool) -> None:
        if not fits:
            raise UnsupportedVersionError(
                f"the rows of LLaMA-Factory's {type(self.inner).__name__} cannot be matched with "
                f"their records: llamafactory {llamafactory.__version__} makes them in another way "
                "than 0.9.5; use 0.9.5, or leave the patch out."
            )


class _Recording:
    """A tokenizer that remembers the lengths of the texts of its last call."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoded = self.tokenizer(*args, **kwargs)
        self.lengths = [len(ids) for ids in encoded["input_ids"]]
        return encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _blocks(names: list[str], lengths: list[int], size: int) -> list[tuple[list[str], list[int]]]:
    """(channels, lengths) of the parts of each full block."""
    blocks: list[tuple[list[str], list[int]]] = [([], [])]
    room = size
    for name, length in zip(names, lengths, strict=True):
        left = length
        while left:
            part = min(left, room)
            blocks[-1][0].append(name)
            blocks[-1][1].append(part)
            left, room = left - part, room - part
            if not room:
                blocks.append(([], []))
                room = size
    return blocks[:-1]
