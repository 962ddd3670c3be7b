"""Labels of single tokens that stand in a column of the records, such as the role of each token.

>>> columns = [("roles", {"user": 1, "assistant": 2})]
>>> record = {"input_ids": [7, 8, 9], "roles": ["user", "assistant", None]}
>>> batch = {"input_ids": torch.tensor([[7, 8, 9, 0]])}
>>> bounds = Boundaries(torch.tensor([0, 4]), torch.tensor([True, True, True, False]))
>>> token_marks(columns, [record], [(0, 4)], bounds, batch)
tensor([[1, 2, 0, 0]])

Letters: B rows, S row length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.axis_settings import ROLES_FIELD
from channel_metrics.core.boundaries import Boundaries
from channel_metrics.core.names import bare, look_up
from channel_metrics.core.token_axes import TokenColumn
from channel_metrics.data.batch_layout import rows_of
from channel_metrics.data.record_order import Span
from channel_metrics.errors import ChannelError, hint

__all__ = ["MARKS_KEY", "absent_columns", "marks_of_record", "marks_of_targets", "token_marks"]

# The batch key for the labels of single tokens, and the column for those of packs.
MARKS_KEY = "channel_marks"


def token_marks(
    columns: Sequence[TokenColumn],
    records: Sequence[Mapping[str, Any]],
    spans: Sequence[Span] | None,
    boundaries: Boundaries,
    batch: Mapping[str, Any],
) -> Tensor:
    """The labels of all tokens, as the sum of their marks, int64 [B, S]; 0 where there is none.

    Args:
        columns: the fields, and the mark of each label.
        records: those of the batch. A record may lack a field.
        spans: where the records lie in the token axis.
        boundaries: of the batch.
        batch: a collated batch.

    Raises:
        ChannelError: a list does not fit the tokens of its record, or holds an unknown label.
    """
    if spans is None or len(spans) != len(records):
        fields = ", ".join(field for field, _ in columns)
        raise ChannelError(
            f"the labels of tokens ({fields}) cannot be placed: the records of a batch are neither "
            "its rows nor its sequences, or the collator returns `channels` itself. Take this axis "
            "out of `axes`, or make one row of each record."
        )
    shape = torch.Size(rows_of(batch))
    marks = torch.zeros(shape.numel(), dtype=torch.int64, device="cpu")
    for record, (start, end) in zip(records, spans, strict=True):
        where = torch.arange(start, end, device="cpu")
        # Records that are padded in the dataset have labels for their pads, too.
        if boundaries.keep is not None and _num_labels(record, columns) != len(where):
            where = where[boundaries.keep[start:end]]
        marks[where] = marks_of_record(record, columns, len(where))
    return marks.view(shape)


def marks_of_record(
    record: Mapping[str, Any], columns: Sequence[TokenColumn], num_tokens: int
) -> Tensor:
    """The labels of the tokens of one record, int64 [num_tokens]; see `token_marks`."""
    marks = torch.zeros(num_tokens, dtype=torch.int64, device="cpu")
    for field, numbers in columns:
        values = look_up(record, field)
        if values is not None:
            marks += _numbers(values, field, numbers, num_tokens)
    return marks


def absent_columns(
    columns: Sequence[TokenColumn], records: Sequence[Mapping[str, Any]]
) -> tuple[int, str]:
    """How many columns no record has, and a warning about them."""
    absent = [f for f, _ in columns if all(look_up(record, f) is None for record in records)]
    why = (
        "Only the patch ms_swift reads roles from a template, in `swift sft` and `swift pt`."
        if absent == [ROLES_FIELD]
        else "The column is missing, or the trainer dropped it when it made tokens of the records."
    )
    return len(absent), (
        f"%d columns with labels of tokens ({', '.join(absent)}) are in none of its records, so "
        f"its tokens are counted as unlabeled on these axes. {why}"
    )


def marks_of_targets(marks: Tensor) -> Tensor:
    """At each position the marks of the next token of its row, which it predicts; 0 at the end."""
    return torch.nn.functional.pad(marks[..., 1:], (0, 1))


def _num_labels(record: Mapping[str, Any], columns: Sequence[TokenColumn]) -> int | None:
    found = (look_up(record, field) for field, _ in columns)
    return next((len(one) for one in found if hasattr(one, "__len__")), None)


def _numbers(values: Any, field: str, numbers: Mapping[Any, int], num_tokens: int) -> Tensor:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or len(values) != num_tokens:
        came = f"{len(values)} entries" if isinstance(values, (list, tuple)) else repr(values)
        raise ChannelError(
            f"field {field!r} of a record must list a label for each of its {num_tokens} tokens, "
            f"but has {came}; cut or pad the record and this list in the dataset, before the "
            "collator."
        )
    for value in {*map(bare, values)} - {None, *numbers}:
        known = [str(one) for one in numbers]
        raise ChannelError(
            f"field {field!r} of a record has the label {value!r}; {hint(str(value), known)} "
            "Name it under `labels` of this axis."
        )
    found = [0 if value is None else numbers[bare(value)] for value in values]
    return torch.tensor(found, dtype=torch.int64, device="cpu")
