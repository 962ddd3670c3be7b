"""Reads the channel of a record, and turns names of channels into ids.

>>> table = LabelTable(["bbu", "rru"])
>>> table.ids(["rru", "bbu", None])
[1, 0, -1]
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from channel_metrics.errors import ChannelError, ConfigError

__all__ = [
    "DEFAULT_FIELDS",
    "UNLABELED",
    "UNLABELED_ID",
    "LabelTable",
    "Unknown",
    "channel_of",
    "channels_of",
    "field_roots",
    "look_up",
    "winning_field",
]

logger = logging.getLogger("channel_metrics")

DEFAULT_FIELDS = ("channel", "dataset_source", "metadata._fusion_source", "dataset_id")
UNLABELED = "unlabeled"
UNLABELED_ID = -1

Unknown = Literal["add", "unlabeled", "error"]

# Names with spaces around them for which a warning has been logged.
_told: set[str] = set()


def field_roots(fields: Sequence[str]) -> tuple[str, ...]:
    """The top-level record keys of dotted `fields`, each once."""
    return tuple(dict.fromkeys(field.split(".", 1)[0] for field in fields))


def channels_of(
    record: Mapping[str, Any],
    fields: Sequence[str] = DEFAULT_FIELDS,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> list[str | None]:
    """The channels of the sequences in one record: one, or several if the record is a pack.

    Args:
        record: a record of a dataset.
        fields: dotted fields. The first one that holds a channel is used. A list there means one
            channel per packed sequence, or one per token.
        classes: {field: names} for fields that hold class numbers, see
            `channel_metrics.data.scan.class_names`.

    Returns:
        The names without spaces around them. A record without a channel gives `[None]`: None,
        NaN, `pd.NA` and an empty string are no channel.

    Raises:
        ChannelError: a field holds no name, or a class number without a name.
    """
    for field in fields:
        value = look_up(record, field)
        names = (classes or {}).get(field, ())
        if getattr(value, "ndim", 0) == 1:
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            return _as_names(value, field, names)
        name = _as_name(value, field, names)
        if name is not None:
            return [name]
    return [None]


def winning_field(record: Mapping[str, Any], fields: Sequence[str] = DEFAULT_FIELDS) -> str | None:
    """The field that gives the channel of a record, see `channels_of`; None if none does."""
    if set(channels_of(record, fields)) == {None}:
        return None  # Also if a field lists only None: the fields after it are not looked at.
    return next(name for name in fields if channels_of(record, [name]) != [None])


def channel_of(
    record: Mapping[str, Any],
    fields: Sequence[str] = DEFAULT_FIELDS,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> str | None:
    """The channel of a record that is one sequence; None if it has none.

    Arguments are as in `channels_of`. Raises `ChannelError` for a record that lists several.
    """
    found = channels_of(record, fields, classes)
    if len(found) != 1:
        raise ChannelError(
            f"expected one channel for a record, but it lists {len(found)}; a record that packs "
            "several sequences is read with channels_of."
        )
    return found[0]


class LabelTable:
    """Maps names to ids and back. Ids count from 0 in the order of the names; -1 is `unlabeled`.

    Args:
        names: the first names.
        unknown: what happens to a new name: "add" adds it to the table, "unlabeled" counts its
            tokens as unlabeled, "error" raises `ChannelError`.

    Raises:
        ConfigError: for another value of unknown.
        ChannelError: for a name that is no string, or empty.
    """

    def __init__(self, names: Iterable[str] = (), *, unknown: Unknown = "add") -> None:
        if unknown not in ("add", "unlabeled", "error"):
            raise ConfigError(f'unknown must be "add", "unlabeled" or "error", but is {unknown!r}.')
        self.unknown: Unknown = unknown
        self._ids: dict[str, int] = {}
        for name in names:
            self.add(name)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of their ids."""
        return tuple(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._ids)}, unknown={self.unknown!r})"

    def add(self, name: str) -> int:
        """The id of `name`, which joins the table if it is new. `unlabeled` is always -1.

        Raises `ChannelError` for a name that must not join.
        """
        bare = _bare(name)
        if bare == UNLABELED:
            return UNLABELED_ID
        if bare in self._ids:
            return self._ids[bare]
        if not isinstance(bare, str) or not bare:
            raise ChannelError(
                f"a channel name must be a non-empty string, but is {name!r}; give the source a "
                "name, or leave the field out to count its tokens as unlabeled."
            )
        self._check(bare)
        return self._ids.setdefault(bare, len(self._ids))

    def add_all(self, names: Iterable[str]) -> list[int]:
        """The ids of `names`, which join the table. If one is refused, none of them joins."""
        with self._all_or_none():
            return [self.add(name) for name in names]

    def ids(self, names: Iterable[str | None]) -> list[int]:
        """The ids of `names`. None is unlabeled; for new names, `unknown` decides.

        Raises `ChannelError` if one is refused; then none of them joins the table.
        """
        with self._all_or_none():
            return [UNLABELED_ID if name is None else self._id(name) for name in names]

    def knows_all(self, names: Iterable[str | None]) -> bool:
        """Whether `ids(names)` would leave the table as it is."""
        return self.unknown != "add" or all(
            n is None or n == UNLABELED or n in self._ids for n in names
        )

    def _check(self, name: str) -> None:
        """Raise an error for a name that must not join. In this class, every name may join."""

    def _remove(self, name: str) -> None:
        """Remove the name that joined last."""
        del self._ids[name]

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """If the block raises, the names that joined in it are removed again."""
        before = len(self._ids)
        try:
            yield
        except Exception:  # of any kind: it is raised again
            for name in reversed(list(self._ids)[before:]):
                self._remove(name)
            raise

    def _id(self, name: str) -> int:
        known = _bare(name) in self._ids or _bare(name) == UNLABELED
        if known or self.unknown == "add":
            return self.add(name)
        if self.unknown == "unlabeled":
            return UNLABELED_ID
        raise ChannelError(
            f"channel {name!r} is not in the declared table {list(self._ids)}; declare it, or set "
            'unknown to "add" or "unlabeled".'
        )


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


def _bare(name: Any) -> Any:
    """A name without the spaces around it; anything else as it is."""
    return name.strip() if isinstance(name, str) else name


def _stripped(name: str) -> str:
    found: str = _bare(name)
    if found and found != name and not _told:
        _told.add(name)
        logger.warning("channel %r has spaces around it: it is counted as %r.", name, found)
    return found
