"""The configuration that every adapter takes: fields, channels, metrics, keys."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from channel_metrics.acting import Budget, Sampler, StopWhen, refuse_unknown_keys
from channel_metrics.alerting import AlertingConfig
from channel_metrics.core.axes import AxisBook
from channel_metrics.core.axis_settings import axes_of, axis_fields, check_axis_format, token_fields
from channel_metrics.core.excess import EXCESS_LOSS
from channel_metrics.core.faults import OnError
from channel_metrics.core.keys import ChannelTable
from channel_metrics.core.labels import DEFAULT_FIELDS, Unknown
from channel_metrics.core.objectives import OBJECTIVES, WEIGHTED
from channel_metrics.core.schema import DEFAULT_METRICS, TOKENS
from channel_metrics.errors import ConfigError

__all__ = ["MetricsConfig", "refuse_unknown_keys"]


@dataclass(frozen=True, kw_only=True)
class MetricsConfig(AlertingConfig):
    """How channels are found and what is logged for them."""

    fields: tuple[str, ...] = DEFAULT_FIELDS
    """Names of record fields that may hold the channel, such as `meta.source`.

    The first one that a record has is used."""

    axes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """More labels of a record: {axis: field, list of fields, or {channel: label}}.

    `{"domain": "metadata._fusion_domain"}` logs `domain/target_loss` and so on beside the
    channels. `{"position": {"by": "position"}}` labels single tokens, as do `length`, `column`
    (with a field of the records), `modality` and, in ms-swift, `template`."""

    cross: tuple[tuple[str, ...], ...] = ()
    """Axes to combine, such as `[["channel", "domain"]]`; `channel` is the channel itself.

    Combinations that occur are logged, as `channel.domain/bbu.target_loss`."""

    tree: int = 0
    """How many levels of names such as `code/python/web` are added up, from the first on.

    `tree: 1` logs `tree/code_loss` over all tokens below `code`, and the mean of its children
    as `tree_mean/code_loss`. 0 adds up nothing."""

    top: int = 0
    """How many channels, and labels of each axis, are logged: those with the most tokens so far.

    The others are added up in `others`. Those that a setting or the trainer follows are logged
    besides. 0 logs all of them."""

    max_keys: int = 10_000
    """How many log keys of channels and labels a run may have, because trackers get slow.

    Channels and labels that come up later are left out of the log, with one warning. They are
    still counted. Keys that the trainer or `stop_when` follows stay. 0 sets no limit."""

    axis_format: str = "{axis}/{label}"
    """What takes the place of `{channel}` in the log keys of an axis."""

    channels: tuple[str, ...] = ()
    """Declared channels. If empty, they are scanned from the dataset or learned from batches."""

    unknown: Unknown = "add"
    """What happens to a channel that was not declared.

    "add" declares it, "unlabeled" counts its tokens as unlabeled, "error" raises."""

    metrics: tuple[str, ...] = DEFAULT_METRICS
    """Names of the metrics that are logged per channel, and of objectives over all channels.

    docs/REFERENCE.md lists them."""

    channel_weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The weight of each channel in `weighted_loss_of_channels`; other channels have none."""

    reference: str = ""
    """A file of JSON lines with `ref_nll`, `ref_tokens` and an id, for `excess_loss`.

    Empty: the records hold `ref_nll` and `ref_tokens` themselves."""

    reference_id: str = "id"
    """The field with the id, in the records and in the file of `reference`."""

    eval_channels: tuple[str, ...] = ()
    """The channels that evaluations log. If empty, they log all of them."""

    key_format: str = "{channel}_{metric}"
    """The form of the log keys.

    `{metric}_{channel}` gives the keys that ms-swift has. `{metric}/{channel}` makes TensorBoard
    group the charts by metric."""

    live_table: bool = True
    """Whether a terminal or a notebook shows a table of the channels during the run."""

    on_error: OnError | None = None
    """What an error in the metrics does.

    "raise" ends the run. "warn" ends only the metrics, with a warning. None raises until the first
    train window has been logged, and warns afterwards."""

    def __post_init__(self) -> None:
        for name in ("fields", "channels", "metrics", "eval_channels", "on_window"):
            value = getattr(self, name)
            listed = isinstance(value, (list, tuple))
            if not listed or not all(isinstance(item, str) for item in value):
                raise ConfigError(f"{name} must be a list of strings, but is {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.reference, (str, os.PathLike)):
            raise ConfigError(f"reference must be the path of a file, but is {self.reference!r}.")
        object.__setattr__(self, "reference", os.fspath(self.reference))
        self.check_acting()
        if self.on_error not in (None, *get_args(OnError)):
            raise ConfigError(
                f'on_error must be "raise", "warn" or None, but is {self.on_error!r}.'
            )
        if not self.fields:
            raise ConfigError("fields must name at least one record field, but is empty.")
        axes, cross = axes_of(self.axes, self.cross)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "cross", cross)
        check_axis_format(self.axis_format)
        for name in ("tree", "top", "max_keys"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ConfigError(f"{name} must be a whole number, 0 or more, but is {value!r}.")
        TOKENS.check(self.metrics, (*TOKENS.loggable, *(one.name for one in OBJECTIVES)))
        if self.reference and not self.with_reference:
            raise ConfigError(f"reference needs {EXCESS_LOSS!r} among metrics; add it.")
        self._check_weights()
        self.new_table()

    def _check_weights(self) -> None:
        weights = self.channel_weights
        numbers = isinstance(weights, Mapping) and all(
            isinstance(w, (int, float)) and 0 < w < math.inf for w in weights.values()
        )
        if not numbers:
            raise ConfigError(
                "channel_weights must be a mapping of channels to numbers above 0, but is "
                f"{weights!r}; leave out a channel that shall not count."
            )
        if bool(weights) != (WEIGHTED in self.metrics):
            raise ConfigError(
                f"channel_weights and the metric {WEIGHTED!r} need each other, but only "
                f"{'channel_weights was' if weights else 'the metric was'} given."
            )

    @property
    def objectives(self) -> tuple[str, ...]:
        """The entries of `metrics` that are one number for all channels."""
        return tuple(one.name for one in OBJECTIVES if one.name in self.metrics)

    @property
    def label_fields(self) -> tuple[str, ...]:
        """`fields`, and entries for the labels on further axes, as `channels_of` takes them."""
        return (*self.fields, *axis_fields(self.axes))

    @property
    def with_reference(self) -> bool:
        """Whether the losses of a reference model are needed."""
        return EXCESS_LOSS in self.metrics

    @property
    def record_fields(self) -> tuple[str, ...]:
        """All fields of a record that are read."""
        own = (self.reference_id,) if self.reference else ("ref_nll", "ref_tokens")
        of_tokens = token_fields(self.axes)
        return (*self.label_fields, *(own if self.with_reference else ()), *of_tokens)

    @property
    def followed(self) -> frozenset[str]:
        """The channels, or `axis/label`, that a setting follows; `top` does not hide them."""
        stop_when, sampler = StopWhen.of(self.stop_when), Sampler.of(self.sampler)
        stops = [stop_when.channel] if stop_when else []
        return frozenset([*stops, *(sampler.start if sampler else ()), *self.eval_channels])

    @property
    def mixture(self) -> Budget | None:
        """What `budget` says, by rows, see `row_of`; None without this setting."""
        budget = Budget.of(self.budget)
        return budget and budget.by_row(self.row_of)

    def row_of(self, name: str) -> str:
        """The row of a channel or label, as `AxisBook.row_of`: of `axis/label` by `axis_format`."""
        return AxisBook(self.axes, self.cross, self.tree, self.axis_format).row_of(name)

    def reading(self, column: str) -> MetricsConfig:
        """This config for records whose joint names are in one column."""
        axes = {a: s if isinstance(s, Mapping) else () for a, s in self.axes.items()}
        return replace(self, fields=(column,), axes=axes)

    @property
    def window_metrics(self) -> tuple[str, ...]:
        """The entries of `metrics` that describe one window."""
        return tuple(name for name in self.metrics if name in TOKENS.window_metrics)

    @property
    def run_metrics(self) -> tuple[str, ...]:
        """The entries of `metrics` that are counts of the whole run."""
        return tuple(name for name in self.metrics if name in TOKENS.run_metrics)

    def new_table(self, reserved: Collection[str] = ()) -> ChannelTable:
        """Make a table of the declared channels.

        Args:
            reserved: log keys that no channel may use.

        Raises:
            ConfigError, ChannelError: a name is not allowed, or two would share a log key.
        """
        return ChannelTable(
            self.channels, unknown=self.unknown, key_format=self.key_format, reserved=reserved
        )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> MetricsConfig:
        """Make a config from plain values, such as those of a YAML file.

        Args:
            mapping: {name of a field: value}.

        Raises:
            ConfigError: a key is unknown, or a value is not allowed.
        """
        refuse_unknown_keys(mapping, [field.name for field in fields(cls)], "metrics config")
        return cls(**mapping)
