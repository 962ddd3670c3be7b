"""The dataset column `channel`, which Axolotl's tokenization would drop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from axolotl.utils.data import wrappers
from datasets import Dataset

from channel_metrics import swap
from channel_metrics.core.labels import channel_of, field_roots
from channel_metrics.data.scan import class_names

__all__ = ["CHANNEL", "NamedStrategy", "UniqueRows", "label_of", "with_channels"]

CHANNEL = "channel"


def label_of(entry: Any, entries: Sequence[Any]) -> str:
    """The channel of an entry of `datasets:`.

    Args:
        entry: it has a `path`, and may have a `name`.
        entries: all of them.

    Returns:
        Its `name`; without one, the shortest end of its path that no other path has.
    """
    if entry.get("name"):
        return str(entry["name"])
    parts = _parts(entry)
    others = [other for other in map(_parts, entries) if other != parts]
    ends = (parts[-count:] for count in range(1, len(parts) + 1))
    end = next(e for e in ends if all(other[-len(e) :] != e for other in others))
    return "/".join(end).strip("/")


def _parts(entry: Any) -> tuple[str, ...]:
    files = entry.get("data_files") or []
    files = [files] if isinstance(files, str) else files
    path = PurePath(files[0] if len(files) == 1 else entry["path"])
    # Not the end of a version, as in `data-v1.5`.
    path = path.with_suffix("") if path.suffix[1:].isalpha() else path
    return ("", *path.parts)


@dataclass
class NamedStrategy:
    """A strategy of Axolotl whose rows have a channel.

    Args:
        inner: makes rows of records.
        name: the channel of records that have none of `fields`.
        fields, classes: see `channel_metrics.core.labels.channel_of`.
    """

    inner: Any
    name: str
    fields: Sequence[str]
    classes: Mapping[str, Sequence[str]]

    def tokenize_prompt(self, prompt: Any) -> Any:
        """Make the row of a record, or those of a batch of records."""
        if not self.inner.supports_batched:
            row = self.inner.tokenize_prompt(prompt)
            return {**row, CHANNEL: self.channel(prompt)} if row else row
        rows: dict[str, list[Any]] = defaultdict(list)
        # One after the other, because a record may give several rows, or none.
        for values in zip(*prompt.values(), strict=True):
            record = dict(zip(prompt, values, strict=True))
            made = self.inner.tokenize_prompt({key: [value] for key, value in record.items()})
            for key, column in made.items():
                rows[key] += column
            count = len(next(iter(made.values()), ()))
            rows[CHANNEL] += [self.channel(record)] * count
        # Axolotl's workers want the same columns from all that give rows.
        return dict(rows) if rows[CHANNEL] else {}

    def channel(self, record: Mapping[str, Any]) -> str | None:
        """The channel that the record names, or that of its dataset."""
        return channel_of(record, self.fields, self.classes, self.name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def with_channels(
    load: Callable[..., Any], given: dict[str, Any], name: str, fields: Sequence[str]
) -> tuple[Any, Any]:
    """Load a dataset whose rows have the column `channel`.

    Args:
        load: returns a dataset and a prompter.
        given: its arguments.
        name: the channel of records that have none of `fields`.
        fields: the record fields that may hold the channel.
    """
    strategies = []

    def named(wrap: Callable[..., Any], strategy: Any, dataset: Any, **kwargs: Any) -> Any:
        strategies.append(NamedStrategy(strategy, name, fields, class_names(dataset, fields)))
        return wrap(strategies[-1], dataset, **kwargs)

    with swap.wrapped(wrappers, "wrap_dataset_for_tokenized_prompt", named):
        dataset, prompter = load(**given)
    if strategies:
        return dataset, prompter
    # Records that came with their tokens. They keep their columns.
    strategy = NamedStrategy(None, name, fields, class_names(dataset, fields))
    if not isinstance(dataset, Dataset):
        return dataset.map(lambda row: {CHANNEL: strategy.channel(row)}), prompter
    roots = [root for root in field_roots(fields) if root in dataset.column_names]
    names = [strategy.channel(row) for row in dataset.select_columns(roots)] if roots else None
    if CHANNEL in dataset.column_names:
        dataset = dataset.remove_columns(CHANNEL)
    return dataset.add_column(CHANNEL, names or [name] * len(dataset)), prompter


class UniqueRows:
    """A dataset for Axolotl's search for duplicates, which compares all columns of its rows."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        for row in self.dataset:
            yield {key: value for key, value in row.items() if key != CHANNEL}

    def select(self, indices: list[int]) -> Any:
        """The rows with these numbers."""
        return self.dataset.select(indices)
