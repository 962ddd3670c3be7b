"""What needs more than one window: how fast a loss falls, and how far a run is with its data.

The slope is that of a straight line through the losses of the last windows, over the tokens that
the channel itself has been trained on. A window with n tokens weighs n, because the variance of
its mean falls with n. Letters: window i has the mean loss y, and x is the middle of its tokens.

    slope = sum(n (x - mean x) (y - mean y)) / S,  S = sum(n (x - mean x)^2)
    error = sqrt(sum(n (y - line)^2) / (windows - 2) / S)

This module does not import torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.registry import RunMetric
from channel_metrics.errors import hint

if TYPE_CHECKING:
    from channel_metrics.core.axes import Projected

__all__ = ["PROGRESS", "WINDOWS", "Point", "Progress", "points_of", "slope"]

WINDOWS = 20
"""How many of the last train windows are looked at."""

# Losses change little per token.
_MILLION = 1e6

PROGRESS = (
    RunMetric(
        "loss_slope",
        "nats per million tokens",
        f"the change of `loss` per million own tokens over the last {WINDOWS} windows; below 0 "
        "where the loss falls",
    ),
    RunMetric(
        "loss_slope_se",
        "nats per million tokens",
        "its standard error, from how far the windows are off the line",
    ),
    RunMetric("epochs", "epochs", "`tokens_total` / the channel's `source_tokens`"),
    RunMetric("budget_share", "", "`tokens_total` / the channel's `token_budget`"),
    RunMetric(
        "eta_steps",
        "steps",
        "optimizer steps until `token_budget` is reached, at the rate of the last "
        f"{WINDOWS} windows",
    ),
)


class Point(NamedTuple):
    """One window of one channel.

    total: its tokens since the run began, this window included. counted: its tokens in this
    window. tokens: those of them with a finite loss. nll: the sum of their losses.
    """

    total: float
    counted: float
    tokens: float
    nll: float


@dataclass(frozen=True)
class _Window:
    step: int
    points: Mapping[str, Point]


class Progress:
    """The last train windows of a run.

    Args:
        names: the metrics that are logged.
        source_tokens: {channel: supervised tokens of one epoch}.
        token_budget: {channel: supervised tokens that it shall be trained on}.
    """

    def __init__(
        self,
        names: Sequence[str],
        source_tokens: Mapping[str, float],
        token_budget: Mapping[str, float],
    ) -> None:
        self.names, self.source_tokens, self.token_budget = names, source_tokens, token_budget
        self._windows: deque[_Window] = deque(maxlen=WINDOWS)
        self._run: object = None

    def add(self, step: int, points: Mapping[str, Point], run: object) -> None:
        """Add a train window. With another `run`, the windows before it are forgotten."""
        if run is not self._run:
            self._windows.clear()
        self._run = run
        self._windows.append(_Window(step, points))

    def unknown(self, totals: Mapping[str, float]) -> list[str]:
        """What to say of names in the config that have no tokens in `totals`, {name: tokens}."""
        return [
            f"{setting} names {name!r}, of which no token was counted so far; "
            f"{hint(name, list(totals))}"
            for setting in ("source_tokens", "token_budget")
            for name in getattr(self, setting)
            if name not in totals
        ]

    def values(self, name: str) -> dict[str, float]:
        """{metric: value} of a channel in the last window; what is not known is absent."""
        of_name = [w.points[name] for w in self._windows if name in w.points]
        if not of_name:
            return {}
        total, found = of_name[-1].total, dict[str, float | None]()
        line = slope(of_name)
        if line is not None:
            found["loss_slope"], found["loss_slope_se"] = (_MILLION * value for value in line)
        if name in self.source_tokens:
            found["epochs"] = total / self.source_tokens[name]
        if name in self.token_budget:
            budget = self.token_budget[name]
            found["budget_share"] = total / budget
            found["eta_steps"] = self._steps_to(name, budget - total)
        return {key: value for key in self.names if (value := found.get(key)) is not None}

    def _steps_to(self, name: str, left: float) -> float | None:
        """The steps in which `left` tokens are trained; None if the rate is not known."""
        if left <= 0:
            return 0.0
        first, *later = self._windows  # the steps of the first window are not known
        steps = later[-1].step - first.step if later else 0
        tokens = sum(window.points[name].counted for window in later if name in window.points)
        return left * steps / tokens if steps > 0 and tokens > 0 else None


def points_of(
    rows: Projected, columns: Sequence[str], totals: Mapping[str, float]
) -> dict[str, Point]:
    """{name: point} of the rows that have tokens in a window.

    rows: its sums. columns: their names. totals: {name: tokens since the run began}.
    """
    tokens, nonfinite, nll = (columns.index(name) for name in ("tokens", "nonfinite", "nll"))
    found = {}
    for name, sums in zip((UNLABELED, *rows.names), rows.sums.tolist(), strict=True):
        if sums[tokens]:
            finite = sums[tokens] - sums[nonfinite]
            found[name] = Point(totals[name], sums[tokens], finite, sums[nll])
    return found


def slope(points: Sequence[Point]) -> tuple[float, float] | None:
    """The slope of the loss in nats per token, and its standard error.

    None with fewer than three windows that have a loss: two give no error.

    >>> slope([Point(10 * i, 10, 10, 10 * (3 - i)) for i in range(1, 4)])
    (-0.1, 0.0)
    """
    used = [point for point in points if point.tokens > 0]
    if len(used) < 3:
        return None
    weights = [point.tokens for point in used]
    mean_of = _mean(weights)
    xs = [point.total - point.counted / 2 for point in used]
    ys = [point.nll / point.tokens for point in used]
    x, y = mean_of(xs), mean_of(ys)
    spread = math.fsum(n * (a - x) ** 2 for n, a in zip(weights, xs, strict=True))
    both = math.fsum(n * (a - x) * (b - y) for n, a, b in zip(weights, xs, ys, strict=True))
    found = both / spread
    rest = math.fsum(
        n * (b - y - found * (a - x)) ** 2 for n, a, b in zip(weights, xs, ys, strict=True)
    )
    return found, math.sqrt(rest / (len(used) - 2) / spread)


def _mean(weights: Sequence[float]) -> Callable[[Sequence[float]], float]:
    whole = math.fsum(weights)
    return lambda values: (
        math.fsum(n * value for n, value in zip(weights, values, strict=True)) / whole
    )
