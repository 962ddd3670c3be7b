"""How fast the loss of a channel falls per own token, over the last train windows.

The slope is that of a straight line through the losses of the windows, over the tokens that the
channel itself has been trained on. A window with n tokens weighs n, because the variance of its
mean falls with n. Letters: window i has the mean loss y, and x is the middle of its tokens.

    slope = sum(n (x - mean x) (y - mean y)) / S,  S = sum(n (x - mean x)^2)
    error = sqrt(sum(n (y - line)^2) / (windows - 2) / S)

This module does not import torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.registry import RunMetric

if TYPE_CHECKING:
    from channel_metrics.core.axes import Projected

__all__ = ["SLOPES", "WINDOWS", "Point", "Slopes", "points_of", "slope"]

WINDOWS = 20
"""How many of the last train windows are looked at."""

# Losses change little per token.
_MILLION = 1e6

SLOPES = (
    RunMetric(
        "loss_slope",
        "nats per million tokens",
        f"the change of `loss` per million own tokens over the last {WINDOWS} windows: "
        "sum(n (x - mean x) (y - mean y)) / S, where a window has n tokens with the mean loss y, "
        "x is their middle and S = sum(n (x - mean x)^2); below 0 where the loss falls",
        "`nll` and `tokens` of windows",
    ),
    RunMetric(
        "loss_slope_se",
        "nats per million tokens",
        "sqrt(sum(n (y - line)^2) / (windows - 2) / S): its standard error, from how far the "
        "windows are off the line",
        "the same",
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


class Slopes:
    """The slopes of a run; `names` are the metrics of them that are logged."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._windows: deque[Mapping[str, Point]] = deque(maxlen=WINDOWS)
        self._run: object = None

    def add(self, points: Mapping[str, Point], run: object) -> None:
        """Add a train window. With another `run`, the windows before it are forgotten."""
        if run is not self._run:
            self._windows.clear()
        self._run = run
        self._windows.append(points)

    def values(self, name: str) -> dict[str, float]:
        """{metric: value} of a channel or label; empty with fewer than three windows."""
        line = slope([points[name] for points in self._windows if name in points])
        if line is None:
            return {}
        found = dict(zip((metric.name for metric in SLOPES), line, strict=True))
        return {key: _MILLION * found[key] for key in self.names}


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
