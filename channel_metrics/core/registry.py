"""Columns are sums, metrics are formulas over sums, and a schema holds both.

`channel_metrics.core.schema` registers those of tokens. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from channel_metrics.errors import ConfigError, hint

if TYPE_CHECKING:
    from torch import Tensor

    from channel_metrics.core.sums import SequenceView, TokenView

__all__ = ["Column", "Metric", "RunMetric", "Schema", "Sums", "ratio", "ratio_of"]

Sums = Mapping[str, float]


@dataclass(frozen=True)
class Column:
    """One sum per channel.

    unit: what is added up: `tokens`, `nats`, `sequences`, `pairs`.
    per_token: a function of a `TokenView`, or the name of an attribute of it. It gives one value
        per token, of the shape of the losses, or None. Only supervised tokens are added up.
    per_sequence: the same for a `SequenceView`, with one value per sequence [N].
    Without both, the adapter gives the values itself (`ChannelMetrics.add`).
    """

    name: str
    unit: str
    doc: str
    total: bool = False
    """Whether it is also counted since the run began, as `<name>_total`; checkpoints keep it."""
    per_token: str | Callable[[TokenView], Tensor | None] | None = None
    per_sequence: str | Callable[[SequenceView], Tensor | None] | None = None
    optional: bool = False
    """Whether it is counted only if the config asks for a metric that needs it."""
    whole: bool = False
    """Whether it needs whole sequences and float64, as squares do. Without them it is left out."""


@dataclass(frozen=True)
class Metric:
    """One value per channel and window.

    formula: takes the sums of one channel by column name. `"all"` is the count column of the
        schema, summed over all channels. It returns None if there is no value.
    """

    name: str
    needs: tuple[str, ...]
    """The columns that the formula reads."""
    formula: Callable[[Sums], float | None]
    unit: str = ""
    """Empty for a share of a whole, which the report shows in percent."""
    doc: str = ""
    label: str = ""
    """The title of its chart in the report. Empty: no chart."""
    adds_up: bool = False
    """Whether the values of two windows may be added, as counts may. `peek` leaves these out."""
    always: bool = False
    """Whether it is logged even if the config's `metrics` do not name it."""
    asked_by: tuple[str, ...] = ()
    """The names in the config's `metrics` that turn it on. Empty: its own name."""
    key: str = ""
    """Its own key format with `{channel}`, used in place of the config's."""
    unlabeled: str = "unlabeled"
    """The name of `unlabeled` in its own key."""
    every_channel: bool = False
    """Whether it is logged also for channels that `eval_channels` leaves out."""
    cost: str = ""
    """What has to be done for it besides adding up its columns."""


@dataclass(frozen=True)
class RunMetric:
    """One value per channel, from the train windows of a run, see `channel_metrics.core.slopes` and
    `gradients`.

    source: what it is computed from. cost: as of a `Metric`.
    """

    name: str
    unit: str
    doc: str
    source: str
    cost: str = ""


@dataclass
class Schema:
    """The columns and metrics of one unit: tokens, preference pairs, completions.

    unit: what is counted. count: the column that counts it. extra: the metrics that are no
    formula over the columns of one window.
    """

    unit: str
    count: str
    columns: list[Column] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    extra: tuple[RunMetric, ...] = ()

    def register(self, *entries: Column | Metric) -> None:
        """Add columns and metrics. Register a metric after the columns that it needs.

        Raises `ConfigError` if a name is taken, or if a metric needs an unknown column.
        """
        for entry in entries:
            is_column = isinstance(entry, Column)
            self._refuse_taken(entry.name, self.column_names if is_column else self.metric_names)
            if isinstance(entry, Column):
                self.columns.append(entry)
                continue
            missing = sorted(set(entry.needs) - {*self.column_names, "all"})
            if missing:
                raise ConfigError(
                    f"metric {entry.name!r} needs the columns {', '.join(missing)}, but there are "
                    f"{', '.join(self.column_names)}; register the column first."
                )
            self.metrics.append(entry)

    def extended(self, *entries: Column | Metric) -> Schema:
        """A copy with more entries; this schema stays as it is."""
        copy = replace(self, columns=list(self.columns), metrics=list(self.metrics))
        copy.register(*entries)
        return copy

    @property
    def column_names(self) -> tuple[str, ...]:
        """The names of the columns, in the order of the table."""
        return tuple(column.name for column in self.columns)

    @property
    def total_names(self) -> tuple[str, ...]:
        """The columns that are kept as totals of the run."""
        return tuple(column.name for column in self.columns if column.total)

    @property
    def run_metrics(self) -> tuple[str, ...]:
        """The names of the totals of the run, such as `tokens_total`."""
        return tuple(f"{name}_total" for name in self.total_names)

    @property
    def of_sequences(self) -> frozenset[str]:
        """The metrics and totals that need more than sums over tokens."""
        columns = {column.name for column in self.columns if column.per_token is None}
        metrics = (metric.name for metric in self.metrics if columns.intersection(metric.needs))
        totals = (f"{name}_total" for name in self.total_names if name in columns)
        return frozenset([*metrics, *totals])

    @property
    def extra_metrics(self) -> tuple[str, ...]:
        """The names of the metrics that are no formula over the columns of one window."""
        return tuple(metric.name for metric in self.extra)

    @property
    def window_metrics(self) -> tuple[str, ...]:
        """The metrics of a window that a config can ask for."""
        return tuple(metric.name for metric in self.metrics if not metric.always)

    @property
    def loggable(self) -> tuple[str, ...]:
        """All metrics that a config can ask for."""
        return (*self.window_metrics, *self.run_metrics, *self.extra_metrics)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """All metrics that can be logged."""
        return (*(m.name for m in self.metrics), *self.run_metrics, *self.extra_metrics)

    def metric(self, name: str) -> Metric | None:
        """The metric with this name; None for a total of the run, or an unknown name."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def check(self, names: Iterable[str], known: Sequence[str] = ()) -> tuple[str, ...]:
        """The names, each once; raises `ConfigError` for an unknown metric.

        known: the metrics that are allowed, by default all that a config can ask for.
        """
        known = known or self.loggable
        chosen = tuple(dict.fromkeys(names))
        for name in chosen:
            if name not in known:
                raise ConfigError(f"unknown metric {name!r}; {hint(name, known)}")
        return chosen

    def chosen(self, names: Sequence[str]) -> list[Metric]:
        """The metrics that a config with these `metrics` logs, in the order of the names."""
        asked = [
            metric
            for name in names
            for metric in self.metrics
            if not metric.always and name in (metric.asked_by or (metric.name,))
        ]
        return list(dict.fromkeys([*asked, *(m for m in self.metrics if m.always)]))

    def narrowed(self, names: Sequence[str]) -> Schema:
        """A copy whose columns are fixed: without the optional ones that no metric of a config
        with these `metrics` needs."""
        needed = {column for metric in self.chosen(names) for column in metric.needs}
        kept = [c for c in self.columns if not c.optional or c.name in needed]
        columns = [replace(column, optional=False) for column in kept]
        return replace(self, columns=columns, metrics=list(self.metrics))

    def values(self, sums: Sums, all_counted: float, metrics: Iterable[Metric]) -> dict[str, float]:
        """{metric: value} of one channel from its sums. A metric without a value is absent.

        all_counted: the count column, summed over all channels of the window.
        """
        given = {**sums, "all": all_counted}
        found = ((metric.name, metric.formula(given)) for metric in metrics)
        return {name: value for name, value in found if value is not None}

    def _refuse_taken(self, name: str, taken: Sequence[str]) -> None:
        if name in taken:
            raise ConfigError(f"{name!r} is registered already for {self.unit}; choose another.")


def ratio(numerator: float, denominator: float) -> float | None:
    """numerator / denominator; None if the denominator is 0."""
    return numerator / denominator if denominator else None


def ratio_of(numerator: str, denominator: str) -> Callable[[Sums], float | None]:
    """The formula of a metric that is one column / another. It can be pickled."""
    return partial(_ratio_of, numerator, denominator)


def _ratio_of(numerator: str, denominator: str, sums: Sums) -> float | None:
    return ratio(sums[numerator], sums[denominator])
