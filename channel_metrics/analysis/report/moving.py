"""Moving means for smooth curves: sums over a moving window, divided once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.core.schema import TOKENS

if TYPE_CHECKING:
    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.store import Steps, Values

__all__ = ["MAX_MEANS", "WINDOW_PARTS", "MovingMeans", "values_at"]

MAX_MEANS = 200
# The moving window has one part in so many of the curve's points: light, medium, strong.
WINDOW_PARTS = (120, 40, 12)


class MovingMeans:
    """Moving means of one run, weighted by tokens: Σ loss·tokens / Σ tokens."""

    def __init__(self, run: Run) -> None:
        self._run = run
        counts = [run.series(name, "tokens") for name in run.channels("train")]
        self._steps = np.unique(np.concatenate([np.empty(0, np.int64), *(s for s, _ in counts)]))
        self._whole = np.zeros(len(self._steps))
        for steps, tokens in counts:
            self._whole += np.nan_to_num(values_at(self._steps, steps, tokens))

    def of(
        self, channel: str, metric: str, num_points: int = MAX_MEANS, part: int = WINDOW_PARTS[1]
    ) -> tuple[Steps, Values]:
        """Steps [N] and moving means [N] of a series, at N <= num_points of its steps.

        part: the moving window has one part in so many of the curve's points.

        The means are not weighted if there are no tokens, and for metrics that are counts.
        """
        own_steps, own = self._run.series(channel, "tokens")
        if metric == "share" and len(own_steps):
            # If the channel is absent, its share is 0, but it is not logged.
            parts = np.nan_to_num(values_at(self._steps, own_steps, own))
            return _moving_ratio(self._steps, parts, self._whole, num_points, part)
        steps, values = self._run.series(channel, metric)
        weights = self._weights(channel, metric, steps)
        usable = np.isfinite(values)
        weights = np.where(usable, weights, 0.0)
        parts = np.where(usable, values, 0.0) * weights
        return _moving_ratio(steps, parts, weights, num_points, part)

    def _weights(self, channel: str, metric: str, steps: Steps) -> Values:
        """The tokens of each step; 1 if they are not logged, and for counts."""
        registered = TOKENS.metric(metric)
        counts = self._run.series(channel, "tokens")
        if channel == GLOBAL:
            counts = self._steps, self._whole
        if not len(counts[0]) or (registered is not None and registered.adds_up):
            return np.ones(len(steps))
        return np.nan_to_num(values_at(steps, *counts))


def _moving_ratio(
    steps: Steps, parts: Values, wholes: Values, num_points: int, part_of_all: int
) -> tuple[Steps, Values]:
    """Σ parts / Σ wholes over one part of all points each; NaN where the whole is 0."""
    count = len(steps)
    half = max(1, count // (2 * part_of_all))
    middles = np.unique(np.linspace(0, count - 1, num_points).astype(np.int64))
    first, end = np.maximum(middles - half, 0), np.minimum(middles + half + 1, count)
    sums = [np.concatenate([[0.0], np.cumsum(column)]) for column in (parts, wholes)]
    part, whole = (column[end] - column[first] for column in sums)
    ratio = np.divide(part, whole, out=np.full(len(middles), np.nan), where=whole > 0)
    return steps[middles], ratio


def values_at(steps: Steps, own_steps: Steps, values: Values) -> Values:
    """The values at `steps`, NaN where there is none."""
    found = np.full(len(steps), np.nan)
    _, here, there = np.intersect1d(steps, own_steps, assume_unique=True, return_indices=True)
    found[here] = values[there]
    return found
