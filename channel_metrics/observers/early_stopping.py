"""Early stopping on a value of one channel, or on an objective over all channels."""

from __future__ import annotations

import math
from typing import Any, Protocol

from channel_metrics.acting import StopWhen
from channel_metrics.core.totals import RunTotals
from channel_metrics.windows import Window

__all__ = ["EarlyStopping", "Session"]

_NOTE = "stop_when"


class Session(Protocol):
    """What this observer asks of a `ChannelMetrics`."""

    totals: RunTotals

    def stop(self, reason: str) -> None:
        """Ask for the end of the run."""


class EarlyStopping:
    """An observer that ends the run after `patience` windows in a row that are no better.

    What it remembers stands in the checkpoints, beside the totals. A value that is not finite is
    no better. A window without the value changes nothing.
    """

    def __init__(self, settings: StopWhen, session: Session) -> None:
        self.settings, self._session = settings, session

    def __call__(self, window: Window) -> None:
        """Look at a window that has the value."""
        value = self._value(window)
        if value is None:
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
        metric = self.settings.metric
        if not self.settings.channel:
            return window.logs.get(metric)
        if not metric.startswith(window.prefix):
            return None
        axis, _, label = self.settings.channel.partition("/")
        of_channel = window.values.get(self.settings.channel) or window.axes.get(axis, {}).get(
            label, {}
        )
        return of_channel.get(metric.removeprefix(window.prefix))
