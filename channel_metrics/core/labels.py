"""Names of channels: how a record carries one, how names become ids, how they become log keys.

>>> table = ChannelTable(["bbu", "rru"])
>>> table.ids(["rru", "bbu", None])
[1, 0, -1]
>>> metric_key("{channel}_{metric}", "bbu", "loss")
'bbu_loss'
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from channel_metrics.core.metrics import ALL_METRICS
from channel_metrics.errors import ChannelError, ConfigError

__all__ = [
    "DEFAULT_FIELDS",
    "UNLABELED",
    "UNLABELED_ID",
    "ChannelTable",
    "Unknown",
    "channel_of",
    "channels_of",
    "check_key_format",
    "field_roots",
    "metric_key",
    "sanitize",
]

DEFAULT_FIELDS = ("channel", "dataset_source", "metadata._fusion_source", "dataset_id")
UNLABELED = "unlabeled"
UNLABELED_ID = -1

Unknown = Literal["add", "unlabeled", "error"]

_MISSING = object()
# What every tracker we know accepts in a key; anything else becomes an underscore.
_UNSAFE = re.compile(r"[^\w.\-/]+")


def sanitize(name: str) -> str:
    """`name` as trackers accept it: letters, digits, `_`, `-`, `.` and `/`."""
    return _UNSAFE.sub("_", name)


def metric_key(key_format: str, channel: str, metric: str) -> str:
    """The log key of a channel's metric, e.g. `bbu_loss` for `{channel}_{metric}`."""
    return key_format.format(channel=sanitize(channel), metric=metric)


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


class ChannelTable:
    """Names to ids and back. Ids count from 0 in the order of the names; -1 is `unlabeled`.

    unknown: what a name outside the table does: "add" grows the table, "unlabeled" counts its
        tokens as unlabeled, "error" raises `ChannelError`.
    key_format: checked here because two names must not end up under one key.
    reserved: log keys that belong to the trainer; a channel whose key would overwrite one is a
        `ConfigError`.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        *,
        unknown: Unknown = "add",
        key_format: str = "{channel}_{metric}",
        reserved: Collection[str] = (),
    ) -> None:
        if unknown not in ("add", "unlabeled", "error"):
            raise ConfigError(f'unknown must be "add", "unlabeled" or "error", but is {unknown!r}.')
        check_key_format(key_format)
        self.unknown: Unknown = unknown
        self.key_format = key_format
        self.reserved = frozenset(reserved)
        self._ids: dict[str, int] = {}
        self._by_key: dict[str, str] = {sanitize(UNLABELED): UNLABELED}
        self._rivals = _rival_metrics(key_format)
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
        return f"ChannelTable({list(self._ids)}, unknown={self.unknown!r})"

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
        other = self._by_key.setdefault(sanitize(name), name)
        if other != name:
            raise ChannelError(
                f"channels {other!r} and {name!r} would both be logged as {sanitize(name)!r}; "
                "rename one of them."
            )
        self._check_keys(name)
        return self._ids.setdefault(name, len(self._ids))

    def open_copy(self) -> ChannelTable:
        """An independent table of the same names and key format, which any name may join."""
        copy = ChannelTable(key_format=self.key_format)
        copy._ids, copy._by_key = dict(self._ids), dict(self._by_key)
        return copy

    def ids(self, names: Iterable[str | None]) -> list[int]:
        """The ids of `names`; None is unlabeled, an unknown name does what `unknown` says."""
        return [UNLABELED_ID if name is None else self._id(name) for name in names]

    def knows_all(self, names: Iterable[str | None]) -> bool:
        """Whether `ids(names)` would neither grow the table nor need to."""
        return self.unknown != "add" or all(
            n is None or n == UNLABELED or n in self._ids for n in names
        )

    def _check_keys(self, name: str) -> None:
        """Refuse a name with a key that is the trainer's, or that of another channel's metric."""
        for metric in ALL_METRICS if self.reserved else ():
            key = metric_key(self.key_format, name, metric)
            if key in self.reserved:
                raise ConfigError(
                    f"channel {name!r} would be logged as {key!r}, which is the trainer's own "
                    "key; rename the channel or choose another key_format."
                )
        for metric, head, tail in self._rivals:
            key = metric_key(self.key_format, name, metric)
            other = self._by_key.get(key[len(head) : len(key) - len(tail)], name)
            if key.startswith(head) and key.endswith(tail) and other != name:
                raise ChannelError(
                    f"channels {other!r} and {name!r} would both be logged as {key!r}, of "
                    "different metrics; rename one of them or choose another key_format."
                )

    def _id(self, name: str) -> int:
        if name in self._ids or name == UNLABELED or self.unknown == "add":
            return self.add(name)
        if self.unknown == "unlabeled":
            return UNLABELED_ID
        raise ChannelError(
            f"channel {name!r} is not in the declared table {list(self._ids)}; declare it, or set "
            'unknown to "add" or "unlabeled".'
        )


def check_key_format(key_format: str) -> None:
    """Raise `ConfigError` unless `key_format` has exactly `{channel}` and `{metric}`."""
    try:
        probe = key_format.format(channel="\0", metric="\1")
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"key_format must be built from {{channel}} and {{metric}}, but {key_format!r} is "
            f"not a format string of these two ({error!r})."
        ) from None
    if "\0" not in probe or "\1" not in probe:
        raise ConfigError(
            f"key_format must hold both {{channel}} and {{metric}}, but is {key_format!r}; "
            "without both, several values would share one key."
        )


def _rival_metrics(key_format: str) -> list[tuple[str, str, str]]:
    """(metric, head, tail): a key of `metric` may also read head + another channel + tail.

    `bbu_weighted` + `_loss` is `bbu` + `_weighted_loss`: one tail ends with the other.
    """
    ends = {
        metric: key_format.format(channel="\0", metric=metric).split("\0", 1)
        for metric in ALL_METRICS
    }
    return [
        (metric, other_ends[0], other_ends[1])
        for metric, (head, tail) in ends.items()
        for other, other_ends in ends.items()
        if metric != other
        and (tail.endswith(other_ends[1]) or other_ends[1].endswith(tail))
        and (head.startswith(other_ends[0]) or other_ends[0].startswith(head))
    ]


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
