"""Moving means for smooth curves: sums over a moving window, divided once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.core.schema import TOKENS

if TYPE_CHECKING:
    from channel_metrics.analysis.report.findings import Gap
    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.store import Steps, Values

__all__ = ["MAX_MEANS", "WINDOW_PARTS", "MovingMeans", "values_at"]

MAX_MEANS = 200
# The moving window is one part in so many of the curve's steps: light, medium, strong.
WINDOW_PARTS = (120, 40, 12)


class MovingMeans:
    """Moving means of one run, weighted by tokens: Σ loss·tokens / Σ tokens.

    A window is a number of steps, and ends where a gap of the channel begins.
    """

    def __init__(self, run: Run, gaps: Iterable[Gap]) -> None:
        self._run = run
        self._gaps = list(gaps)
        counts = [run.series(name, "tokens") for name in run.channels("train")]
        self._steps = np.unique(np.concatenate([np.empty(0, np.int64), *(s for s, _ in counts)]))
        self._whole = np.zeros(len(self._steps))
        for steps, tokens in counts:
            self._whole += np.nan_to_num(values_at(self._steps, steps, tokens))

    def of(
        self, channel: str, metric: str, num_points: int = MAX_MEANS, part: int = WINDOW_PARTS[1]
    ) -> tuple[Steps, Values]:
        """Steps [N] and moving means [N] of a series, at N <= num_points of its steps.

        part: the moving window has one part in so many of the curve's steps.

        The means are not weighted if there are no tokens, and for metrics that are counts.
        """
        own_steps, own = self._run.series(channel, "tokens")
        if metric == "share" and len(own_steps):
            # If the channel is absent, its share is 0, but it is not logged.
            parts = np.nan_to_num(values_at(self._steps, own_steps, own))
            whole = self._whole
            return self._means(channel, self._steps, parts, whole, num_points=num_points, part=part)
        steps, values = self._run.series(channel, metric)
        weights = self._weights(channel, metric, steps)
        usable = np.isfinite(values)
        weights = np.where(usable, weights, 0.0)
        parts = np.where(usable, values, 0.0) * weights
        places, means = self._means(
            channel, steps, parts, weights, num_points=num_points, part=part
        )
        # What became NaN for good has no means there, though windows reach back before it.
        means[places > steps[usable].max(initial=-1)] = np.nan
        return places, means

    def _means(
        self,
        channel: str,
        steps: Steps,
        parts: Values,
        wholes: Values,
        *,
        num_points: int,
        part: int,
    ) -> tuple[Steps, Values]:
        gaps = [gap for gap in self._gaps if gap.channel == channel]
        begins = [np.searchsorted(steps, gap.first_step, side="right") for gap in gaps]
        ends = [np.searchsorted(steps, gap.last_step) for gap in gaps]
        edges = np.unique([0, *begins, *ends, len(steps)])
        return _moving_ratio(steps, parts, wholes, edges, num_points=num_points, part=part)

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
    steps: Steps, parts: Values, wholes: Values, edges: Steps, *, num_points: int, part: int
) -> tuple[Steps, Values]:
    """Σ parts / Σ wholes over one part of the steps each; NaN where the whole is 0.

    edges: places [E] in `steps`, from 0 to its length, which no window crosses.
    """
    middles = np.unique(np.linspace(0, len(steps) - 1, num_points).astype(np.int64))
    half = (steps[-1] - steps[0]) / (2 * part)
    stretch = np.searchsorted(edges, middles, side="right")
    first = np.searchsorted(steps, steps[middles] - half)
    end = np.searchsorted(steps, steps[middles] + half, side="right")
    first, end = np.maximum(first, edges[stretch - 1]), np.minimum(end, edges[stretch])
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
