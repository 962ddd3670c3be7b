"""Reads the channel of a record, and turns names of channels into ids.

>>> table = LabelTable(["bbu", "rru"])
>>> table.ids(["rru", "bbu", None])
[1, 0, -1]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from channel_metrics.core.names import (
    MARK,
    bare,
    fields_of_channel,
    first_names,
    joint_name,
    labels_of_axes,
    look_up,
    split_field,
    split_name,
)
from channel_metrics.errors import ChannelError, ConfigError

__all__ = [
    "DEFAULT_FIELDS",
    "UNLABELED",
    "UNLABELED_ID",
    "LabelTable",
    "Unknown",
    "channel_of",
    "channels_of",
    "field_columns",
    "field_roots",
    "look_up",
    "winning_field",
]

DEFAULT_FIELDS = ("channel", "dataset_source", "metadata._fusion_source", "dataset_id")
UNLABELED = "unlabeled"
UNLABELED_ID = -1

Unknown = Literal["add", "unlabeled", "error"]


def field_roots(fields: Sequence[str]) -> tuple[str, ...]:
    """The top-level record keys of dotted `fields`, each once."""
    return tuple(dict.fromkeys(split_field(field)[1].split(".", 1)[0] for field in fields))


def field_columns(fields: Sequence[str]) -> set[str]:
    """The columns of a dataset that may hold `fields`: their roots, or flat dotted names."""
    return {*field_roots(fields), *(split_field(field)[1] for field in fields)}


def channels_of(
    record: Mapping[str, Any],
    fields: Sequence[str] = DEFAULT_FIELDS,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> list[str | None]:
    """The channels of the sequences in one record: one, or several if the record is a pack.

    Args:
        record: a record of a dataset.
        fields: dotted fields. The first one that holds a channel is used. A list there means one
            channel per packed sequence, or one per token. With fields of axes among them, see
            `channel_metrics.core.axis_settings.axis_fields`, each channel is a joint name.
        classes: {field: names} for fields that hold class numbers, see
            `channel_metrics.data.scan.class_names`.

    Returns:
        The names without spaces around them. A record without a channel gives `[None]`: None,
        NaN, `pd.NA` and an empty string are no channel.

    Raises:
        ChannelError: a field holds no name, or a class number without a name.
    """
    own = fields_of_channel(fields)
    names: list[str | None] = first_names(record, own, classes or {})
    if len(own) == len(fields):
        return names
    labels = labels_of_axes(record, fields, classes or {}, len(names))
    return [joint_name(name, of_name) for name, of_name in zip(names, labels, strict=True)]


def winning_field(record: Mapping[str, Any], fields: Sequence[str] = DEFAULT_FIELDS) -> str | None:
    """The field that gives the channel of a record, see `channels_of`; None if none does."""
    if set(channels_of(record, fields)) == {None}:
        return None  # Also if a field lists only None: the fields after it are not looked at.
    return next(name for name in fields if channels_of(record, [name]) != [None])


def channel_of(
    record: Mapping[str, Any],
    fields: Sequence[str] = DEFAULT_FIELDS,
    classes: Mapping[str, Sequence[str]] | None = None,
    otherwise: str | None = None,
) -> str | None:
    """The channel of a record that is one sequence; None if it has none.

    Arguments are as in `channels_of`; `otherwise` is the channel of a record without one. Raises
    `ChannelError` for a record that lists several.
    """
    found = channels_of(record, fields, classes)
    if len(found) != 1:
        raise ChannelError(
            f"expected one channel for a record, but it lists {len(found)}; a record that packs "
            "several sequences is read with channels_of."
        )
    if otherwise is None:
        return found[0]
    channel, labels = split_name(found[0] or "")
    return joint_name(channel or otherwise, labels)


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
        own = bare(name)
        if own == UNLABELED:
            return UNLABELED_ID
        if own in self._ids:
            return self._ids[own]
        if not isinstance(own, str) or not own:
            raise ChannelError(
                f"a channel name must be a non-empty string, but is {name!r}; give the source a "
                "name, or leave the field out to count its tokens as unlabeled."
            )
        self._check(own)
        return self._ids.setdefault(own, len(self._ids))

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
        grows = self.unknown == "add"
        return all(
            n is None or n == UNLABELED or n in self._ids or not (grows or MARK in n) for n in names
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
        known = bare(name) in self._ids or bare(name) == UNLABELED
        if known or self.unknown == "add":
            return self.add(name)
        channel, labels = split_name(name)
        if labels and (channel is None or channel in self._ids):
            return self.add(name)
        if self.unknown == "unlabeled":
            others = joint_name(None, labels)
            return UNLABELED_ID if others is None else self.add(others)
        raise ChannelError(
            f"channel {channel!r} is not in the declared table {list(self._ids)}; declare it, or "
            'set unknown to "add" or "unlabeled".'
        )
