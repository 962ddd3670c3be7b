"""Reads names out of records, and joins the labels of a record to one string.

A joint name is a channel and labels on further axes, see `channel_metrics.core.axes`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from channel_metrics.errors import ChannelError

__all__ = [
    "MARK",
    "bare",
    "fields_of_channel",
    "first_names",
    "joint_name",
    "labels_of_axes",
    "look_up",
    "split_field",
    "split_name",
    "token_label",
    "token_name",
]

logger = logging.getLogger("channel_metrics")

# Begins each label in a joint name, and ends the axis of a field.
MARK = "\x01"
# Begins the name of a label that belongs to single tokens, and to no channel.
_TOKENS = "\x02"

# Names with spaces around them for which a warning has been logged.
_told: set[str] = set()

Classes = Mapping[str, Sequence[str]]


def split_field(field: str) -> tuple[str, str]:
    """(axis, field) of an entry of `fields`; the axis of the channel is empty."""
    axis, _, name = field.rpartition(MARK)
    return axis, name


def fields_of_channel(fields: Sequence[str]) -> list[str]:
    """The entries of `fields` that hold the channel, and not a label on another axis."""
    return [field for field in fields if MARK not in field]


def joint_name(channel: str | None, labels: Iterable[tuple[str, str]]) -> str | None:
    """The channel and the labels (axis, label) of a record as one string; None if all are None."""
    return (channel or "") + "".join(f"{MARK}{axis}={label}" for axis, label in labels) or None


def split_name(name: str) -> tuple[str | None, list[tuple[str, str]]]:
    """(channel, labels) of a joint name."""
    channel, *labels = name.split(MARK)
    pairs = [(axis, label) for axis, _, label in (one.partition("=") for one in labels)]
    return channel or None, pairs


def token_name(axis: str, label: str) -> str:
    """What a label of single tokens is called in a label table, see `core.token_axes`."""
    return f"{_TOKENS}{axis}={label}"


def token_label(name: str | None) -> tuple[str, str] | None:
    """(axis, label) of a `token_name`; None for a joint name."""
    if name is None or not name.startswith(_TOKENS):
        return None
    axis, _, label = name[len(_TOKENS) :].partition("=")
    return axis, label


def first_names(
    record: Mapping[str, Any], fields: Sequence[str], classes: Classes
) -> list[str | None]:
    """The names in the first of `fields` that holds any; `[None]` if none does."""
    for field in fields:
        value, names = _value(record, field), classes.get(field, ())
        if isinstance(value, list):
            return _as_names(value, field, names)
        name = _as_name(value, field, names)
        if name is not None:
            return [name]
    return [None]


def labels_of_axes(
    record: Mapping[str, Any], fields: Sequence[str], classes: Classes, num_sequences: int
) -> list[list[tuple[str, str]]]:
    """For each sequence of a record its labels (axis, label), in the order of the axes.

    A name is the label of all sequences. A list holds one entry per sequence of a pack, or several
    labels of a record that is one sequence. An entry may be a list of several labels.

    Args:
        record: a record of a dataset.
        fields: as for `channels_of`; those of channels are not looked at.
        classes: {field: names} for fields that hold class numbers.
        num_sequences: how many channels the record lists.

    Raises:
        ChannelError: a list is too short or too long, or holds no names.
    """
    found: dict[str, list[list[str]]] = {}
    for entry in fields:
        axis, field = split_field(entry)
        if axis and not any(found.get(axis, ())):
            names = classes.get(field, ())
            found[axis] = _per_sequence(_value(record, field), field, names, num_sequences)
    return [
        [(axis, label) for axis, labels in found.items() for label in labels[number]]
        for number in range(num_sequences)
    ]


def _per_sequence(
    value: Any, field: str, classes: Sequence[str], num_sequences: int
) -> list[list[str]]:
    """The labels of each sequence."""
    nested = isinstance(value, list) and any(isinstance(one, (list, tuple)) for one in value)
    if not isinstance(value, list) or (num_sequences == 1 and not nested):
        return [_several(value, field, classes)] * num_sequences
    if len(value) != num_sequences:
        raise ChannelError(
            f"field {field!r} of a record lists labels for {len(value)} sequences, but the record "
            f"has {num_sequences} channels; give one label, or a list of labels, per sequence."
        )
    return [_several(one, field, classes) for one in value]


def _several(value: Any, field: str, classes: Sequence[str]) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    names = [_as_name(one, field, classes) for one in values]
    return list(dict.fromkeys(name for name in names if name is not None))


def _value(record: Mapping[str, Any], field: str) -> Any:
    value = look_up(record, field)
    if getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value


def look_up(record: Mapping[str, Any], field: str) -> Any:
    """The value of a dotted field of a record; None if the record does not have it."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _as_names(values: Sequence[Any], field: str, classes: Sequence[str]) -> list[str | None]:
    # A list with one channel per token is long, but holds few different values.
    try:
        names = {value: _as_name(value, field, classes) for value in set(values)}
    except TypeError:  # not hashable, such as a tensor of one number
        return [_as_name(value, field, classes) for value in values]
    return [names[value] for value in values]


def _as_name(value: Any, field: str, classes: Sequence[str] = ()) -> str | None:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        # A column of integers in which some are missing arrives as floats.
        value = None if math.isnan(value) else int(value)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pd.NA, without pandas
        return None
    if isinstance(value, str):
        return _stripped(value) or None
    if isinstance(value, int) and not isinstance(value, bool):
        return _class_name(value, field, classes) if classes else str(value)
    raise ChannelError(
        f"field {field!r} of a record must be a name or an integer, but is "
        f"{type(value).__name__}; point `fields` at the entry that holds the channel."
    )


def _class_name(number: int, field: str, classes: Sequence[str]) -> str | None:
    """The name of a class; -1 means no class."""
    if -1 <= number < len(classes):
        return None if number == -1 else classes[number]
    raise ChannelError(
        f"field {field!r} of a record must be the number of a class, -1 or 0 to "
        f"{len(classes) - 1}, but is {number}; the column's ClassLabel has too few names."
    )


def bare(name: Any) -> Any:
    """A name without the spaces around it; anything else as it is."""
    return name.strip() if isinstance(name, str) else name


def _stripped(name: str) -> str:
    found: str = bare(name)
    if found and found != name and not _told:
        _told.add(name)
        logger.warning("channel %r has spaces around it: it is counted as %r.", name, found)
    return found
