"""The curves of a run for charts, over steps and over the channel's own tokens.

Long curves are thinned out. Of each stretch, the lowest and highest values are kept, so no peak is
lost. A smooth curve is computed from all points: sums over moving windows, divided once. A curve is
broken at a gap of its channel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.findings import Gap, find_gaps
from channel_metrics.analysis.report.moving import MAX_MEANS, WINDOW_PARTS, MovingMeans, values_at
from channel_metrics.analysis.rows import loss_metric, totals_at
from channel_metrics.core.schema import TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from channel_metrics.analysis.readers.keys import Key
    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.store import Steps, Values
    from channel_metrics.core.schema import Metric

    Indices = NDArray[np.int64]

__all__ = [
    "MEDIUM",
    "Curve",
    "charts",
    "curves_of",
    "is_over_run",
    "own_tokens",
    "pick_points",
    "splits_of",
]

_SPLITS = ("train", "eval", "test", "probe")

# A shorter curve gets no smooth curve.
_MIN_SMOOTHED = 120

# Strengths of smoothing are numbered from 1, see `WINDOW_PARTS`.
MEDIUM = 2


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of one channel; values [N] that are NaN break the line."""

    channel: str
    """The channel, or `GLOBAL`."""

    metric: str
    """The name of one of `charts()`."""

    split: str
    """`train`, `eval`, `test` or `probe`."""

    steps: Steps
    """int64 [N], in order."""

    values: Values
    """float64 [N]."""

    tokens: Steps | None
    """Supervised tokens of the channel up to each step, int64 [N]; None if none were counted."""

    num_points: int
    """The number of points in the log; N is smaller if some were left out."""

    band: Values | None = None
    """The low and high ends of an interval, float64 [2, N], if the log has one."""

    is_estimate: bool = False
    """Whether the values are estimated from the loss of the whole run."""

    is_overwritten: bool = False
    """Whether a resume has done its steps again."""

    smooth: int = 0
    """How strongly it is smoothed, from 1; 0 if it has the points of the log."""

    @property
    def is_smooth(self) -> bool:
        """Whether it is a moving mean of all points."""
        return self.smooth > 0


def charts() -> list[Metric]:
    """The metrics that have a chart, which are those with a `label`."""
    return [metric for metric in TOKENS.metrics if metric.label]


def splits_of(run: Run) -> list[str]:
    """The splits with values of these metrics, in a fixed order."""
    names = tuple(metric.name for metric in charts())
    found = {key.split for key in run.keys if key.metric.startswith(names)}
    return [split for split in _SPLITS if split in found]


def curves_of(
    run: Run, channels: Iterable[str], limit: int, strengths: Sequence[int] = (MEDIUM,)
) -> Iterator[Curve]:
    """All curves of `channels` and of the run's own values, with at most `limit` points each.

    `limit` is at least 5. Smooth curves follow the curve that they are computed from.

    strengths: how strongly curves are smoothed; each one gives a curve more.
    """
    found = find_gaps(run)
    gaps = defaultdict(list)
    for gap in found:
        gaps[gap.channel].append(gap)
    means = MovingMeans(run, found)
    for split in splits_of(run):
        for channel in (GLOBAL, *channels):
            for metric in charts():
                # The mix of an evaluation does not change, so it needs no curve.
                if split != "train" and metric.name == "share":
                    continue
                curve = _curve(run, channel, metric.name, split, limit)
                if curve is None:
                    continue
                broken_at = gaps[channel] if split == "train" else []
                yield _broken(curve, broken_at)
                if split == "train" and curve.num_points >= _MIN_SMOOTHED:
                    for strength in strengths:
                        yield _broken(_smooth(run, curve, means, limit, strength), broken_at)


def own_tokens(run: Run, channel: str, steps: Steps) -> Steps | None:
    """Tokens that a channel was trained on up to each of `steps`, int64 [N]; None if not logged."""
    totals = totals_at(run, channel, "tokens", steps)
    return None if totals is None else np.asarray(np.rint(totals).astype(np.int64))


def is_over_run(key: Key) -> bool:
    """Whether a series is logged over steps. Megatron logs values over samples, too."""
    return bool(key.channel) or any(metric.name == key.metric for metric in charts())


def pick_points(values: Values, limit: int) -> Indices:
    """Indices of at most `limit` points, in order, that keep the shape of `values` [N].

    The points are cut into stretches of equal length. Of each stretch, the lowest and the highest
    point are kept, and one that is NaN or infinite, if there is any. The first and the last point
    of the curve are kept, too.
    """
    count = len(values)
    if count <= limit:
        return np.arange(count)
    edges = np.linspace(0, count, max(1, (limit - 2) // 3) + 1).astype(np.int64).tolist()
    finite = np.isfinite(values)
    low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    picked = [0, count - 1]
    for first, end in pairwise(edges):
        stretch = slice(first, end)
        picked += [first + int(low[stretch].argmin()), first + int(high[stretch].argmax())]
        if not finite[stretch].all():
            picked.append(first + int(finite[stretch].argmin()))
    return np.unique(picked)


def _curve(run: Run, channel: str, metric: str, split: str, limit: int) -> Curve | None:
    name = (loss_metric(run, channel, split) if metric == "loss" else metric) or metric
    steps, values = run.series(channel, name, split)
    if not len(steps):
        return None
    picked = pick_points(values, limit)
    band = _band(run, channel, name, split, steps)
    return Curve(
        channel=channel,
        metric=metric,
        split=split,
        steps=steps[picked],
        values=np.where(np.isfinite(values), values, np.nan)[picked],
        tokens=_tokens(run, channel, steps[picked]),
        num_points=len(steps),
        band=None if band is None else band[:, picked],
        is_estimate=name == "loss_estimate",
    )


def _smooth(run: Run, curve: Curve, means: MovingMeans, limit: int, strength: int) -> Curve:
    metric = "loss_estimate" if curve.is_estimate else curve.metric
    # A wide window needs fewer points to look smooth.
    count = min(limit, MAX_MEANS if strength <= MEDIUM else MAX_MEANS // 2)
    steps, values = means.of(curve.channel, metric, count, WINDOW_PARTS[strength - 1])
    tokens = _tokens(run, curve.channel, steps)
    return replace(curve, steps=steps, values=values, tokens=tokens, band=None, smooth=strength)


def _tokens(run: Run, channel: str, steps: Steps) -> Steps | None:
    return None if channel == GLOBAL else own_tokens(run, channel, steps)


def _band(run: Run, channel: str, metric: str, split: str, steps: Steps) -> Values | None:
    """The interval that was logged with a value, float64 [2, N] at the steps of the value."""
    ends = [run.series(channel, f"{metric}_{end}", split) for end in ("low", "high")]
    if not all(len(end_steps) for end_steps, _ in ends):
        return None
    return np.stack([values_at(steps, *end) for end in ends])


def _broken(curve: Curve, gaps: Iterable[Gap]) -> Curve:
    """The curve with a NaN inside each gap, so that no line is drawn across it."""
    places = [int(np.searchsorted(curve.steps, gap.last_step)) for gap in gaps]
    inside = [place for place in places if 0 < place < len(curve.steps)]
    if not inside:
        return curve
    return replace(
        curve,
        steps=np.insert(curve.steps, inside, curve.steps[inside]),
        values=np.insert(curve.values, inside, np.nan),
        tokens=None
        if curve.tokens is None
        else np.insert(curve.tokens, inside, curve.tokens[inside]),
        band=None if curve.band is None else np.insert(curve.band, inside, np.nan, axis=1),
    )
