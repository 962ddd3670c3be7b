"""The channels of the rows that LLaMA-Factory makes.

Its processors may drop records, pack them in another order, or cut them. So the tokens carry the
number of their record while the rows are made, see `channel_metrics.data.numbered`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from llamafactory.data.processor import PackedSupervisedDatasetProcessor, PretrainDatasetProcessor

from channel_metrics import swap
from channel_metrics.data.numbered import number_of, numbered, unmatched, without_numbers
from channel_metrics.trainers.hf.columns import LENGTHS_COLUMN, NAMES_COLUMN

__all__ = ["NumberedRecords"]

_PACKING = (PackedSupervisedDatasetProcessor, PretrainDatasetProcessor)

# {column: one list per record, or per row}
Columns = MutableMapping[str, list[Any]]


@dataclass
class NumberedRecords:
    """A dataset processor of LLaMA-Factory whose rows keep the channels of their records.

    A row of one record has a name. One of several has a list of names, and their lengths.
    """

    inner: Any

    def print_data_example(self, example: Any) -> None:
        self.inner.print_data_example(example)

    def preprocess_dataset(self, examples: Mapping[str, list[Any]]) -> Columns:
        """Make rows of records, and add our columns."""
        records = {key: examples[key] for key in examples}
        with swap.wrapped(*self._numbering(records)):
            made: Columns = self.inner.preprocess_dataset(records)
        if not made:
            return made
        names = [None, *records[NAMES_COLUMN]]
        rows = made["input_ids" if "input_ids" in made else "chosen_input_ids"]
        parts = [self._parts(row) for row in rows]
        for row in rows:
            row[:] = without_numbers(row)
        made[NAMES_COLUMN] = [[names[number] for number, _ in row] for row in parts]
        if isinstance(self.inner, _PACKING):
            made[LENGTHS_COLUMN] = [[length for _, length in row] for row in parts]
        else:
            made[NAMES_COLUMN] = [row[0] if row else None for row in made[NAMES_COLUMN]]
        return made

    def _numbering(self, records: Columns) -> tuple[Any, str, Any]:
        """The function that encodes records, and what to run in its place."""
        # LLaMA-Factory passes its own list of messages on.
        numbers = {id(prompt): number for number, prompt in enumerate(records["_prompt"], 1)}

        def encode(original: Any, *args: Any, prompt: Any, **kwargs: Any) -> Any:
            ids, *others = original(*args, prompt=prompt, **kwargs)
            return [numbered(ids, numbers[id(prompt)]), *others]

        def tokenize(original: Any, *args: Any, **kwargs: Any) -> Any:
            encoded = original(*args, **kwargs)
            of_texts = enumerate(encoded["input_ids"], 1)
            encoded["input_ids"] = [numbered(ids, number) for number, ids in of_texts]
            return encoded

        if isinstance(self.inner, PretrainDatasetProcessor):
            return type(self.inner.tokenizer), "__call__", tokenize
        return self.inner, "_encode_data_example", encode

    def _parts(self, row: list[int]) -> list[tuple[int, int]]:
        """The number of each record in a row, and how many tokens of it the row has."""
        numbers = [number_of(token) for token in row]
        while numbers and not numbers[-1]:
            numbers.pop()  # padding
        if len(numbers) > 1 and not numbers[0]:
            numbers[0] = numbers[1]  # overwritten: it begins the text
        if 0 in numbers or (row and not numbers):
            raise unmatched(f"the rows of LLaMA-Factory's {type(self.inner).__name__}", "0.9.5")
        return [(number, len(list(group))) for number, group in groupby(numbers)]
