"""What the mixture should be and what it is: shares, epochs over each source, time to go.

The values are added to the log of each train window, under the keys of metrics:

    bbu_target_share, bbu_achieved_share, bbu_source_epochs, bbu_eta_hours
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from channel_metrics.acting import Budget, goals
from channel_metrics.config import MetricsConfig
from channel_metrics.core.keys import KeyBook
from channel_metrics.core.schema import Schema
from channel_metrics.errors import ConfigError, hint
from channel_metrics.windows import Window

__all__ = ["BudgetValues", "Goal", "Session", "StopAt", "goals_of"]

Totals = Mapping[str, Mapping[str, int]]


class Session(Protocol):
    """What these observers ask of a `ChannelMetrics`."""

    config: MetricsConfig
    keys: KeyBook
    schema: Schema

    def is_label(self, row: str) -> bool:
        """Whether a row is a label of an axis."""

    def stop(self, reason: str) -> None:
        """Ask for the end of the run."""

    def warn_once(self, message: str, *values: object) -> None:
        """Warn."""


class Goal:
    """A total that ends the run.

    Args:
        key: `bbu_tokens`, or `tokens` of all channels.
        end: the total.
        session: its schema has the columns that are counted.
        where: the setting, for messages.

    Raises:
        ConfigError: the key names nothing that is counted.
    """

    def __init__(self, key: str, end: float, session: Session, where: str = "stop_at") -> None:
        self.key, self.end, self._session = key, end, session
        counts = [name.removesuffix("_total") for name in session.schema.run_metrics]
        name = next((n for n in counts if key == n or key.endswith(f"_{n}")), None)
        if name is None or key == f"_{name}":
            raise ConfigError(
                f"{key!r} in {where} names no total; give CHANNEL_{counts[0]}, or one of "
                f"{', '.join(counts)} for all channels."
            )
        self._total = f"{name}_total"
        self.channel = session.config.row_of(key.removesuffix(name).removesuffix("_"))

    def now(self, totals: Totals) -> int:
        """The total so far."""
        if self.channel:
            return totals.get(self.channel, {}).get(self._total, 0)
        rows = (of for row, of in totals.items() if not self._session.is_label(row))
        return sum(of_row[self._total] for of_row in rows)


def _say_unknown(session: Session, what: str, name: str, known: Iterable[str]) -> None:
    said = f"{what} {name!r}, which no record has had so far; %s"
    session.warn_once(said, hint(name, list(known)))


def goals_of(given: Mapping[str, object], session: Session, where: str = "stop_at") -> list[Goal]:
    """The goals of a setting; raises `ConfigError` as `Goal`."""
    return [Goal(key, end, session, where) for key, end in goals(given).items()]


class StopAt:
    """An observer that ends the run when a total is reached.

    goals: any of them ends it.
    """

    def __init__(self, goals: list[Goal], session: Session) -> None:
        self._goals, self._session = goals, session

    def __call__(self, window: Window) -> None:
        """Look at the totals of a train window."""
        if window.split != "train":
            return
        for goal in self._goals:
            now = goal.now(window.totals)
            if now >= goal.end:
                self._session.stop(
                    f"{goal.key} of stop_at has reached {now:,} of {goal.end:,.0f} at step "
                    f"{window.step}"
                )
            elif goal.channel and goal.channel not in window.names:
                what = f"{goal.key} of stop_at names"
                _say_unknown(self._session, what, goal.channel, window.names)


class BudgetValues:
    """Values for the log of each train window.

    Args:
        settings: what the mixture should be; None if only the time to go is wanted.
        goals: of `stop_at`. Those of the settings count for channels that have none here.
        session: gives the keys.
    """

    def __init__(self, settings: Budget | None, goals: list[Goal], session: Session) -> None:
        self._settings, self._session = settings or Budget(), session
        self._until = goals_of(self._settings.until, session, "until of budget")
        self._goals = _by_channel(self._until) | _by_channel(goals)
        self._unit = f"{self._settings.unit}_total"
        units = [self._settings.unit] if self._settings.ratios else []
        counted = [name.removesuffix("_total") for name in session.schema.run_metrics]
        for unit in [*units, *(["tokens"] if self._settings.tokens else [])]:
            if unit not in counted:
                raise ConfigError(
                    f"budget is in {unit}, which are not counted here; known are "
                    f"{', '.join(counted)}."
                )
        # Time and totals of the first window of this process, for the speed.
        self._first: tuple[float, dict[str, int]] | None = None

    def __call__(self, window: Window) -> dict[str, float]:
        """{log key: value} of a window; nothing of an evaluation."""
        if window.split != "train" or not window.has_counts:
            return {}
        self._say_unknown(window)
        found = [*self._shares(window.totals), *self._epochs(window.totals)]
        logs = {self._session.keys.key(row, metric): value for row, metric, value in found}
        return logs | self._hours(window)

    def _say_unknown(self, window: Window) -> None:
        for setting in ("ratios", "records", "tokens"):
            for row in getattr(self._settings, setting):
                if row not in window.totals:
                    _say_unknown(self._session, f"{setting} of budget name", row, window.totals)
        for goal in self._until:
            if goal.channel and goal.channel not in window.totals:
                what = f"{goal.key} in until of budget names"
                _say_unknown(self._session, what, goal.channel, window.totals)

    def _shares(self, totals: Totals) -> Iterator[tuple[str, str, float]]:
        ratios = self._settings.ratios
        if not ratios:
            return
        rows = [row for row in totals if not self._session.is_label(row)]
        whole, parts = sum(totals[row][self._unit] for row in rows), sum(ratios.values())
        for row, ratio in ratios.items():
            yield row, "target_share", ratio / parts
            yield row, "achieved_share", totals.get(row, {}).get(self._unit, 0) / whole

    def _epochs(self, totals: Totals) -> Iterator[tuple[str, str, float]]:
        for unit in ("records", "tokens"):
            total = "samples_total" if unit == "records" else "tokens_total"
            for row, of_source in getattr(self._settings, unit).items():
                yield row, "source_epochs", totals.get(row, {}).get(total, 0) / of_source

    def _hours(self, window: Window) -> dict[str, float]:
        """How long the next goal will take, of each channel, at the mean speed of this process."""
        goals = [goal for of_channel in self._goals.values() for goal in of_channel]
        now = {goal.key: goal.now(window.totals) for goal in goals}
        if self._first is None or window.time <= self._first[0]:
            self._first = window.time, now
            return {}
        began, before = self._first
        found: dict[str, float] = {}
        for goal in goals:
            speed = (now[goal.key] - before[goal.key]) / (window.time - began)
            if speed > 0:
                key, left = self._key(goal), max(goal.end - now[goal.key], 0.0)
                found[key] = min(left / speed / 3600, found.get(key, math.inf))
        return found

    def _key(self, goal: Goal) -> str:
        return self._session.keys.key(goal.channel, "eta_hours") if goal.channel else "eta_hours"


def _by_channel(goals: Iterable[Goal]) -> dict[str, list[Goal]]:
    found: dict[str, list[Goal]] = {}
    for goal in goals:
        found.setdefault(goal.channel, []).append(goal)
    return found
