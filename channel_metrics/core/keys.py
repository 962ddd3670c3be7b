"""Makes the log keys of channels, and finds values that would share a key.

>>> book = KeyBook("{channel}_{metric}", reserved=["eval_loss"])
>>> book.key("bbu", "loss"), book.key("bbu", "loss", "eval_")
('bbu_loss', 'eval_bbu_loss')
>>> [type(error).__name__ for error in book.learn(["bbu", "eval"])]
['ConfigError']

A key is a head, a channel and a tail: `eval_` + `bbu` + `_loss`. Two splittings can give one key:
`bbu_weighted` + `_loss` is `bbu` + `_weighted_loss`, `eval_bbu` + `_loss` is `eval_` + `bbu_loss`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from channel_metrics.core.key_steps import SAME, Form, steps_between
from channel_metrics.core.labels import UNLABELED, LabelTable, Unknown
from channel_metrics.core.schema import TOKENS, Schema
from channel_metrics.errors import ChannelError, ChannelMetricsError, ConfigError

__all__ = ["ChannelTable", "KeyBook", "check_key_format", "metric_key", "sanitize"]

# Every tracker that we know accepts the characters that are not matched here.
_UNSAFE = re.compile(r"[^\w.\-/]+")


def sanitize(name: str) -> str:
    """`name` with `_` in place of all but letters, digits, `_`, `-`, `.` and `/`."""
    return _UNSAFE.sub("_", name)


def metric_key(key_format: str, channel: str, metric: str) -> str:
    """The log key of a channel's metric, e.g. `bbu_loss` for `{channel}_{metric}`."""
    return key_format.format(channel=sanitize(channel), metric=metric)


def check_key_format(key_format: str) -> None:
    """Raise `ConfigError` unless `key_format` has exactly `{channel}` and `{metric}`, once each."""
    try:
        parts = list(string.Formatter().parse(key_format))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"key_format must be built from {{channel}} and {{metric}}, but {key_format!r} is "
            f"not a format string of these two ({error!r})."
        ) from None
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    if sorted(fields) != [("channel", "", None), ("metric", "", None)]:
        raise ConfigError(
            f"key_format must hold both {{channel}} and {{metric}}, once and as they are, but is "
            f"{key_format!r}; otherwise several values would share one key."
        )


class KeyBook:
    """All log keys of a run: those of channels, metrics and splits, and the trainer's own.

    Args:
        key_format: built from `{channel}` and `{metric}`.
        reserved: keys that the trainer logs itself.
        schema: the metrics. All of them take part, so a config may ask for more of them later.
        objectives: keys of one value for all channels, one in each split.
        rewrite: how the trainer's writers change a key (those of ms-swift turn "/" into "_").
            Keys that are equal afterwards are one key.

    Attributes:
        watched: keys that something waits for, so that neither `top` nor `max_keys` may leave
            them out.

    Raises:
        ConfigError: for a format that gives two metrics one key.
    """

    def __init__(
        self,
        key_format: str = "{channel}_{metric}",
        *,
        reserved: Iterable[str] = (),
        schema: Schema = TOKENS,
        objectives: Iterable[str] = (),
        rewrite: Callable[[str], str] = str,
    ) -> None:
        check_key_format(key_format)
        self.key_format, self.schema, self.reserved = key_format, schema, frozenset(reserved)
        self.clashes: set[str] = set()
        self.watched: set[str] = set()
        self._objectives, self._rewrite, self._known = tuple(objectives), rewrite, set[str]()
        # {name as it is written: channel}
        self._names: dict[str, str] = {}
        self._prepare([""])
        self.learn([UNLABELED])

    def key(self, channel: str, metric: str, prefix: str = "") -> str:
        """The log key, e.g. `eval_bbu_loss`."""
        own = self.schema.metric(metric)
        if own is None or not own.key:
            return prefix + metric_key(self.key_format, channel, metric)
        name = own.unlabeled if channel == UNLABELED else sanitize(channel)
        return prefix + own.key.format(channel=name)

    def is_watched(self, channel: str, prefix: str = "") -> bool:
        """Whether `watched` has a key of this channel, in the split with this prefix."""
        likely = {key for key in self.watched if sanitize(channel) in key}
        return bool(likely) and not likely.isdisjoint(
            self.key(channel, metric, prefix) for metric in self.schema.metric_names
        )

    def learn(
        self, channels: Iterable[str] = (), prefix: str | None = None
    ) -> list[ChannelMetricsError]:
        """Add channels, and a split's prefix. Returns an error for each channel that clashes."""
        new = [name for name in channels if name not in self._known]
        if prefix is not None and prefix not in self._prefixes:
            self._prepare([*self._prefixes, prefix])
            new = [*self._known, *new]
        return self._clashes(new)

    def _clashes(self, names: Iterable[str]) -> list[ChannelMetricsError]:
        # The keys that are shared join `clashes`.
        found = []
        for name in names:
            error, keys = self.look(name)
            if error is not None and not keys <= self.clashes:
                found.append(error)
            self.clashes |= keys
            self._known.add(name)
            self._names.setdefault(self._rewrite(sanitize(name)), name)
        return found

    def forget(self, name: str) -> None:
        """Remove a channel that shares no key."""
        self._known.discard(name)
        self._names.pop(self._rewrite(sanitize(name)), None)

    def reserve(self, keys: Iterable[str]) -> list[ChannelMetricsError]:
        """Reserve more keys of the trainer. Returns errors as `learn` does."""
        if self.reserved.issuperset(keys := list(keys)):
            return []
        self.reserved |= frozenset(keys)
        self._prepare(self._prefixes)
        return self._clashes(list(self._known))

    def look(self, name: str) -> tuple[ChannelMetricsError | None, set[str]]:
        """The error if `name` shares keys with known names or the trainer, and those keys."""
        safe = self._rewrite(sanitize(name))
        other = self._names.get(safe, name)
        if other != name:
            keys = {
                self.key(channel, metric, prefix)
                for channel in (name, other)
                for metric in self.schema.metric_names
                for prefix in self._prefixes
            }
            # Sorted, because ranks may meet the two in another order.
            one, two = sorted([other, name])
            said = f"channels {one!r} and {two!r} would both be logged as {safe!r}"
            return ChannelError(f"{said}; rename one of them."), keys
        error, keys = self._shared(name, safe)
        taken = {self.key(name, *form) for form in self._forbidden.get(safe, ())}
        if taken:
            is_ours = min(taken).endswith(self._objectives) and min(taken) not in self.reserved
            owner = "the key of an objective" if is_ours else "the trainer's own key"
            return ConfigError(
                f"channel {name!r} would be logged as {min(taken)!r}, which is {owner}; rename "
                "the channel or choose another key_format."
            ), taken | keys
        return error, keys

    def _shared(self, name: str, safe: str) -> tuple[ChannelMetricsError | None, set[str]]:
        said, keys = None, set()
        for step, pairs in self._steps.items():
            needed = step(safe)
            # In two splits, a name may clash with itself: `weighted_` + `weighted` + `_loss`.
            other = name if needed == safe else self._names.get(needed or "")
            if other is None:
                continue
            keys |= {self.key(name, *mine) for mine, _ in pairs}
            keys |= {self.key(other, *theirs) for _, theirs in pairs}
            who = f"channels {other!r} and {name!r} would both"
            said = said or (
                f"{who if other != name else f'channel {name!r} would twice'} be logged as "
                f"{self.key(name, *pairs[0][0])!r}, of different metrics or splits; rename "
                f"{'one of them' if other != name else 'it'} or choose another key_format."
            )
        return (None if said is None else ChannelError(said)), keys

    def _prepare(self, prefixes: list[str]) -> None:
        """Compute what depends on the splits and the metrics, and not on the channels."""
        forms = {
            (metric, prefix): self._ends(metric, prefix)
            for prefix in prefixes
            for metric in self.schema.metric_names
        }
        steps = steps_between(tuple(forms.items()))
        for mine, other in steps.get(SAME, ()):
            if mine[1] == other[1]:  # In two splits: a clash of all.
                raise ConfigError(
                    f"key_format {self.key_format!r} gives {mine[0]!r} and {other[0]!r} of a "
                    f"channel the same key {self.key('channel', *mine)!r}; choose another."
                )
        self._prefixes, self._steps = prefixes, steps
        # {name: the forms whose keys are taken}
        self._forbidden: dict[str, list[Form]] = {}
        own = [metric.name for metric in self.schema.metrics if metric.key]
        ours = {self.key(UNLABELED, name, prefix) for name in own for prefix in prefixes}
        ours |= {prefix + name for name in self._objectives for prefix in prefixes}
        for key in map(self._rewrite, self.reserved | ours):
            for form, (head, tail) in forms.items():
                fits = key.startswith(head) and key.endswith(tail)
                if fits and len(key) > len(head) + len(tail):
                    name = key[len(head) : len(key) - len(tail)]
                    self._forbidden.setdefault(name, []).append(form)

    def _ends(self, metric: str, prefix: str) -> tuple[str, str]:
        """The parts of a key before and after the channel."""
        own = self.schema.metric(metric)
        key_format = own.key if own is not None and own.key else self.key_format
        head, tail = key_format.format(channel="\0", metric=metric).split("\0")
        return self._rewrite(prefix + head), self._rewrite(tail)


class ChannelTable(LabelTable):
    """A `LabelTable` for an accumulator without a session. A name joins only if its keys are free.

    names, unknown: as for `LabelTable`. key_format: of the keys that `compute` returns.
    reserved: keys that a channel must not have.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        *,
        unknown: Unknown = "add",
        key_format: str = "{channel}_{metric}",
        reserved: Iterable[str] = (),
    ) -> None:
        self.keys = KeyBook(key_format, reserved=reserved)
        super().__init__(names, unknown=unknown)

    def __reduce__(self) -> tuple[Any, ...]:
        # Tables are pickled for worker processes. Formulas may be lambdas, so they are left out.
        made = partial(
            ChannelTable,
            unknown=self.unknown,
            key_format=self.key_format,
            reserved=self.keys.reserved,
        )
        return made, (self.names,)

    @property
    def key_format(self) -> str:
        """How its channels are logged."""
        return self.keys.key_format

    def open_copy(self, names: Sequence[str] = ()) -> ChannelTable:
        """An independent table with the same names and key format; new names may join it.

        names: the names of the copy in their order, its own among them. Only new ones are checked.
        """
        copy = ChannelTable(key_format=self.key_format)
        copy._ids = dict(self._ids)
        copy.keys._known, copy.keys._names = set(self.keys._known), dict(self.keys._names)
        if names and tuple(names) != self.names:
            copy.add_all(name for name in names if name not in self)
            copy._ids = {name: index for index, name in enumerate(names)}
        return copy

    def _check(self, name: str) -> None:
        error, _ = self.keys.look(name)
        if error is not None:
            raise error
        self.keys.learn([name])

    def _remove(self, name: str) -> None:
        super()._remove(name)
        self.keys.forget(name)
