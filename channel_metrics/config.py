"""The configuration that every adapter takes: fields, channels, metrics, keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from channel_metrics.core.faults import OnError
from channel_metrics.core.keys import ChannelTable
from channel_metrics.core.labels import DEFAULT_FIELDS, Unknown
from channel_metrics.core.schema import DEFAULT_METRICS, TOKENS
from channel_metrics.errors import ConfigError, hint

__all__ = ["MetricsConfig", "refuse_unknown_keys"]


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """How channels are found and what is logged for them."""

    fields: tuple[str, ...] = DEFAULT_FIELDS
    """Dotted record fields that may hold the channel; the first that is there wins."""

    channels: tuple[str, ...] = ()
    """Declared channels. Empty: found in the data (scanned from a column, or met on the way)."""

    unknown: Unknown = "add"
    """What a channel outside the declared ones does: "add", "unlabeled" or "error"."""

    metrics: tuple[str, ...] = DEFAULT_METRICS
    """What is logged per channel, see `channel_metrics.core.schema`."""

    eval_channels: tuple[str, ...] = ()
    """The channels that evaluation logs; empty means all of them."""

    key_format: str = "{channel}_{metric}"
    """The log key. `{metric}_{channel}` gives ms-swift's names, `{metric}/{channel}` folders."""

    live_table: bool = True
    """Whether a terminal or a notebook shows the channels while the run goes on."""

    on_error: OnError | None = None
    """What an error in the metrics does: "raise" ends the run, "warn" ends the metrics only.

    None raises until the first train window has been logged, and warns afterwards."""

    def __post_init__(self) -> None:
        for name in ("fields", "channels", "metrics", "eval_channels"):
            value = getattr(self, name)
            listed = isinstance(value, (list, tuple))
            if not listed or not all(isinstance(item, str) for item in value):
                raise ConfigError(f"{name} must be a list of strings, but is {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if self.on_error not in (None, *get_args(OnError)):
            raise ConfigError(
                f'on_error must be "raise", "warn" or None, but is {self.on_error!r}.'
            )
        if not self.fields:
            raise ConfigError("fields must name at least one record field, but is empty.")
        TOKENS.check(self.metrics)
        self.new_table()

    @property
    def window_metrics(self) -> tuple[str, ...]:
        """Those of `metrics` that are about one window."""
        return tuple(name for name in self.metrics if name in TOKENS.window_metrics)

    @property
    def run_metrics(self) -> tuple[str, ...]:
        """Those of `metrics` that are about the whole run."""
        return tuple(name for name in self.metrics if name in TOKENS.run_metrics)

    def new_table(self, reserved: Collection[str] = ()) -> ChannelTable:
        """A table of the declared channels; raises for names that cannot stand side by side."""
        return ChannelTable(
            self.channels, unknown=self.unknown, key_format=self.key_format, reserved=reserved
        )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> MetricsConfig:
        """From plain values (YAML); an unknown key is refused with the nearest right one."""
        refuse_unknown_keys(mapping, [field.name for field in fields(cls)], "metrics config")
        return cls(**mapping)


def refuse_unknown_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for the first key that is not in `known`, naming the nearest."""
    known = list(known)
    for key in mapping:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {where}; {hint(str(key), known)}")
