"""Names of channels: how a record carries one, and how names become ids.

>>> table = LabelTable(["bbu", "rru"])
>>> table.ids(["rru", "bbu", None])
[1, 0, -1]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
]

DEFAULT_FIELDS = ("channel", "dataset_source", "metadata._fusion_source", "dataset_id")
UNLABELED = "unlabeled"
UNLABELED_ID = -1

Unknown = Literal["add", "unlabeled", "error"]

_MISSING = object()


def field_roots(fields: Sequence[str]) -> tuple[str, ...]:
    """The top-level record keys that dotted `fields` live under, each once."""
    return tuple(dict.fromkeys(field.split(".", 1)[0] for field in fields))


def channels_of(
    record: Mapping[str, Any], fields: Sequence[str] = DEFAULT_FIELDS
) -> list[str | None]:
    """The channels of the sequences in one record: one, or several where it is a pack.

    The first field that is there and not None wins; a list there means one channel per packed
    sequence. A record without any gives `[None]`.
    """
    for field in fields:
        value = _lookup(record, field)
        if isinstance(value, (list, tuple)):
            return [_as_name(item, field) for item in value]
        if value is not _MISSING and value is not None:
            return [_as_name(value, field)]
    return [None]


def channel_of(record: Mapping[str, Any], fields: Sequence[str] = DEFAULT_FIELDS) -> str | None:
    """The channel of a record that is one sequence; None where it has none."""
    found = channels_of(record, fields)
    if len(found) != 1:
        raise ChannelError(
            f"expected one channel for a record, but it lists {len(found)}; a record that packs "
            "several sequences is read with channels_of."
        )
    return found[0]


class LabelTable:
    """Names to ids and back. Ids count from 0 in the order of the names; -1 is `unlabeled`.

    unknown: what a name outside the table does: "add" grows the table, "unlabeled" counts its
        tokens as unlabeled, "error" raises `ChannelError`.
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
        """The id of `name`, which joins the table if it is new; `unlabeled` is always -1."""
        if name == UNLABELED:
            return UNLABELED_ID
        if name in self._ids:
            return self._ids[name]
        if not isinstance(name, str) or not name.strip():
            raise ChannelError(
                f"a channel name must be a non-empty string, but is {name!r}; give the source a "
                "name, or leave the field out to count its tokens as unlabeled."
            )
        self._check(name)
        return self._ids.setdefault(name, len(self._ids))

    def ids(self, names: Iterable[str | None]) -> list[int]:
        """The ids of `names`; None is unlabeled, an unknown name does what `unknown` says."""
        return [UNLABELED_ID if name is None else self._id(name) for name in names]

    def knows_all(self, names: Iterable[str | None]) -> bool:
        """Whether `ids(names)` would neither grow the table nor need to."""
        return self.unknown != "add" or all(
            n is None or n == UNLABELED or n in self._ids for n in names
        )

    def _check(self, name: str) -> None:
        """Raise for a name that must not join; here all may."""

    def _id(self, name: str) -> int:
        if name in self._ids or name == UNLABELED or self.unknown == "add":
            return self.add(name)
        if self.unknown == "unlabeled":
            return UNLABELED_ID
        raise ChannelError(
            f"channel {name!r} is not in the declared table {list(self._ids)}; declare it, or set "
            'unknown to "add" or "unlabeled".'
        )


def _lookup(record: Mapping[str, Any], field: str) -> Any:
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _as_name(value: Any, field: str) -> str | None:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ChannelError(
        f"field {field!r} of a record must be a name or an integer, but is "
        f"{type(value).__name__}; point `fields` at the entry that holds the channel."
    )
