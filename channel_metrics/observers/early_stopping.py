"""Early stopping on a value of one channel, or on an objective over all channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from channel_metrics.acting import StopWhen
from channel_metrics.config import MetricsConfig
from channel_metrics.core.schema import Schema
from channel_metrics.core.totals import RunTotals
from channel_metrics.errors import hint
from channel_metrics.windows import Window

__all__ = ["EarlyStopping", "Session"]

_NOTE = "stop_when"


class Session(Protocol):
    """What this observer asks of a `ChannelMetrics`."""

    config: MetricsConfig
    schema: Schema
    totals: RunTotals

    def stop(self, reason: str) -> None:
        """Ask for the end of the run."""

    def warn_once(self, message: str, *values: object) -> None:
        """Warn."""


class EarlyStopping:
    """An observer that ends the run after `patience` windows in a row that are no better.

    What it remembers stands in the checkpoints, beside the totals. A value that is not finite is
    no better. A window without the value changes nothing.
    """

    def __init__(self, settings: StopWhen, session: Session) -> None:
        self.settings, self._session = settings, session
        self._row = session.config.row_of(settings.channel)
        self._evaluated: set[str] = set()

    def __call__(self, window: Window) -> None:
        """Look at a window that has the value."""
        value = self._value(window)
        if value is None:
            self._say_unknown(window)
            return
        wanted, notes = self.settings, self._session.totals.notes
        own: dict[str, Any] = notes.setdefault(_NOTE, {"best": None, "step": None, "bad": 0})
        sign = 1 if wanted.mode == "max" else -1
        best = own["best"]
        if math.isfinite(value) and (best is None or sign * (value - best) > wanted.min_delta):
            own.update(best=value, step=window.step, bad=0)
            return
        own["bad"] += 1
        if own["bad"] >= wanted.patience:
            since = "no value was finite" if best is None else f"the best was {best:.6g}"
            of = f" of {wanted.channel}" if wanted.channel else ""
            self._session.stop(
                f"{wanted.metric}{of} is {value:.6g} at step {window.step}, and not better for "
                f"{own['bad']} windows of stop_when; {since}"
                + ("" if best is None else f" at step {own['step']}")
            )

    def _value(self, window: Window) -> float | None:
        if not self.settings.channel:
            return window.logs.get(self.settings.metric)
        metric = self._metric(window)
        return self._values(window).get(metric) if metric else None

    def _metric(self, window: Window) -> str:
        """The metric that is wanted of a channel in this window; empty if it is that of others."""
        metric = self.settings.metric
        name = metric.removeprefix(window.prefix) if metric.startswith(window.prefix) else ""
        return name if name in self._session.schema.metric_names else ""

    def _values(self, window: Window) -> Mapping[str, float]:
        """{metric: value} of the channel or label."""
        if self._row in window.values:
            return window.values[self._row]
        row_of = self._session.config.row_of
        rows = (
            (row_of(f"{axis}/{label}"), values)
            for axis, of_axis in window.axes.items()
            for label, values in of_axis.items()
        )
        return next((values for row, values in rows if row == self._row), {})

    def _say_unknown(self, window: Window) -> None:
        """Warn of a name that no window has had: of the channel, or of the metric."""
        wanted = self.settings
        if _NOTE in self._session.totals.notes:
            return
        if wanted.channel and self._metric(window) and self._row not in window.names:
            said = f"stop_when names {wanted.channel!r}, which no record has had so far; %s"
            self._session.warn_once(said, hint(self._row, window.names))
            return
        # At the second evaluation on one set, all sets have been evaluated.
        is_second = window.split in self._evaluated
        if window.split != "train":
            self._evaluated.add(window.split)
        if is_second:
            of = f" of {wanted.channel}" if wanted.channel else ""
            self._session.warn_once(
                f"stop_when waits for {wanted.metric!r}{of}, which no window has had so far; "
                "compare it with the keys of the log."
            )
