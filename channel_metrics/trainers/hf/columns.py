"""A dataset column with the channel of each record, and how it outlives preprocessing.

What else travels with a record is a part of the name, see `data.carried`.

Frameworks drop the columns that they do not know. So the column is added before, and the functions
that make rows of records get a wrapper that passes it on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset, Value

from channel_metrics.core.labels import channel_of, field_columns
from channel_metrics.data.carried import Carried
from channel_metrics.data.scan import class_names, label_records

__all__ = ["LENGTHS_COLUMN", "NAMES_COLUMN", "KeepsNames", "with_channel_column"]

# The channel of each row or, if a row holds several records, those of all of them; and their
# lengths. Not "channel", which may be a column that the framework makes a prompt of.
NAMES_COLUMN, LENGTHS_COLUMN = "channel_names", "channel_lengths"


def with_channel_column(
    dataset: Any,
    fields: Sequence[str],
    column: str = "channel",
    otherwise: str | None = None,
    carried: Carried | None = None,
) -> Any:
    """Add a column with the channel of each record, before a framework's preprocessing.

    Class numbers become names, because few frameworks keep the `ClassLabel` of a column.

    Args:
        dataset: a dataset or a stream. Anything else is returned as it is.
        fields: dotted fields that may hold the channel. The first that a record has is used.
        column: the name of the column.
        otherwise: the channel of records without one.
        carried: joins the channel with what else travels with a record.

    Returns:
        A dataset with the column, or the same object if there is nothing to fill in.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    classes = class_names(dataset, fields)
    roots = carried.roots if carried else ()
    present = field_columns([*fields, *roots]) & {*(dataset.column_names or ())}
    if otherwise is None and not present - {column} and not classes:
        return dataset
    of_names: dict[str, Any] = {"fields": tuple(fields), "classes": classes, "otherwise": otherwise}
    given: dict[str, Any] = {"of_names": of_names, "carried": carried}
    if isinstance(dataset, IterableDataset):
        features = None if dataset.features is None else dataset.features.copy()
        if features is not None:
            features[column] = Value("string")
        given["column"] = column
        return dataset.map(_with_channel, fn_kwargs=given, features=features)
    names = [_name(record, **given) for record in label_records(dataset, [*fields, *roots])]
    if not any(name is not None for name in names):
        return dataset
    if column in dataset.column_names:
        dataset = dataset.remove_columns(column)
    return dataset.add_column(column, names)


def _with_channel(record: dict[str, Any], column: str, **given: Any) -> dict[str, Any]:
    return {**record, column: _name(record, **given)}


def _name(
    record: Mapping[str, Any], of_names: Mapping[str, Any], carried: Carried | None
) -> str | None:
    name = channel_of(record, **of_names)
    return carried.joined([record], [[name]])[0][0] if carried else name


@dataclass(frozen=True)
class KeepsNames:
    """A function of a framework that makes rows of records. Its rows keep `NAMES_COLUMN`.

    Args:
        make: makes a row of a record or, if `batched`, columns of columns. It may make several
            rows of a record, or none.
        batched: whether it takes many records at once.
    """

    make: Callable[[Any], Any]
    batched: bool = False

    def __call__(self, given: Mapping[str, Any]) -> Any:
        """The row of one record, or the columns of many."""
        if not self.batched:
            row = self.make(given)
            return {**row, NAMES_COLUMN: given[NAMES_COLUMN]} if row else row
        rows: dict[str, list[Any]] = defaultdict(list)
        # One record after the other. Else it would not be known which rows are whose.
        for values in zip(*given.values(), strict=True):
            record = dict(zip(given, values, strict=True))
            made = self.make({key: [value] for key, value in record.items()})
            count = len(next(iter(made.values()), ()))
            for key, column in {**made, NAMES_COLUMN: [record[NAMES_COLUMN]] * count}.items():
                rows[key] += column
        # Axolotl's workers want the same columns from all that give rows.
        return dict(rows) if rows[NAMES_COLUMN] else {}
