"""Finds the channels that an SFT file names, before the training.

Files are read in batches of columns, because reading each line would take minutes for a large file.
If messages or channel fields have different keys in different lines, `datasets` stores them as
JSON. Only the lines of such files are decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from channel_metrics.core.labels import channels_of

__all__ = ["sft_channel_names"]

_MESSAGES = "messages"
_BATCH = 10_000


def sft_channel_names(lines: Any, fields: Sequence[str]) -> set[str]:
    """Collect the channels of an SFT file.

    Args:
        lines: a `datasets.Dataset` with a column `messages`, a list of mappings per line.
        fields: the fields of a line or a message that may hold a channel.
    """
    heads = {field if field in lines.column_names else field.split(".")[0] for field in fields}
    lines = lines.select_columns([n for n in lines.column_names if n in {*heads, _MESSAGES}])
    if "arrow.json" in str(lines.features.arrow_schema):
        return _decoded_names(lines, fields)
    names: set[str] = set()
    for batch in lines.with_format("arrow").iter(batch_size=_BATCH):
        records = {name: batch.column(name).combine_chunks() for name in batch.column_names}
        messages = records.pop(_MESSAGES).flatten()
        names |= _column_names(records, fields) | _column_names(_struct_fields(messages), fields)
    return names


def _decoded_names(lines: Any, fields: Sequence[str]) -> set[str]:
    names: set[str] = set()
    for batch in lines.iter(batch_size=_BATCH):
        rows = (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
        for row in rows:
            names |= _names_of((row, *(row.get(_MESSAGES) or ())), fields)
    return names


def _names_of(records: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> set[str]:
    return {name for record in records for name in channels_of(record, fields) if name}


def _column_names(columns: Mapping[str, Any], fields: Sequence[str]) -> set[str]:
    """The names in Arrow columns. Fields after one that all records have are not read."""
    names: set[str] = set()
    for field in fields:
        head, *rest = [field] if field in columns else field.split(".")
        column = columns.get(head)
        for key in rest:
            column = None if column is None else _struct_fields(column).get(key)
        if column is None:
            continue
        values = column.to_pylist() if _is_list(column) else column.unique().to_pylist()
        names |= _names_of(({field: value} for value in values), [field])
        if column.null_count == 0:
            break
    return names


def _struct_fields(column: Any) -> dict[str, Any]:
    if not str(column.type).startswith("struct"):
        return {}
    return {field.name: column.field(i) for i, field in enumerate(column.type)}


def _is_list(column: Any) -> bool:
    return str(column.type).startswith(("list", "large_list"))
