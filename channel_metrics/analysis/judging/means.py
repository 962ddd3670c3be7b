"""Means of stretches of a series, and the differences between them that noise explains.

A series is cut into up to 18 blocks of consecutive values, and the means of blocks are compared.
The noise is read off the bends (second differences) of these means, so a steady rise or fall is
no noise. A difference is more than noise if it is larger than 99 of 100 differences in series that
only scatter around a constant. Such series are drawn here, for each number of blocks.

Fewer values than that tell no noise. If the log has their standard errors, single values are
compared instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from channel_metrics.analysis.store import Steps, Values

__all__ = [
    "CORRELATION",
    "LEVEL",
    "MIN_VALUES",
    "Difference",
    "Rise",
    "Series",
    "difference",
    "rise_of",
]

# One of so many series without a trend is taken for one that rises.
LEVEL = 0.01
# How much neighbours correlate in the series that are drawn. A model changes slowly, so neighbours
# are not quite independent.
CORRELATION = 0.3
# A third needs two blocks, and the noise needs two bends.
MIN_VALUES = 6
# Each third has six blocks. More blocks are shorter, so that they correlate more.
_MAX_BLOCKS = 18
# Means of more values than this hardly correlate.
_MAX_SIZE = 10
# The 99 % quantile of so many draws is exact to about 3 %.
_DRAWS = 10_000


class Series(NamedTuple):
    """The finite values of a metric."""

    steps: Steps
    """int64 [N], increasing."""

    values: Values
    """float64 [N]."""

    weights: Values | None = None
    """float64 [N], such as the tokens of each value. All weigh the same if there are none, or if
    one is not above 0."""

    errors: Values | None = None
    """float64 [N], the standard errors of the values; NaN where the log has none."""


@dataclass(frozen=True, kw_only=True)
class Rise:
    """The last third of a series compared with the lowest stretch of the same length before it."""

    change: float
    """The mean of the last third minus that of the lowest stretch."""

    limit: float
    """The part of `change` that noise can explain."""

    level: float
    """The mean of the lowest stretch."""

    low_step: int
    """The step of the lowest value; of a long series, of the lowest mean of a block."""

    low: float
    """This value."""

    last: float
    """The last value; of a long series, the mean of the last block."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of a series minus that of another one, over the last third of their common steps."""

    change: float
    """The difference."""

    limit: float
    """The part of it that noise can explain."""

    level: float
    """The mean of the other series."""

    last_step: int
    """The last common step."""


class _Blocks:
    """Σ weight * value and Σ weight of consecutive blocks, as equal in length as possible."""

    def __init__(self, values: Values, weights: Values | None) -> None:
        if weights is None or not (weights > 0).all():
            weights = np.ones(len(values))
        count = min(len(values), _MAX_BLOCKS)
        self.size = len(values) // count
        starts = np.linspace(0, len(values), count, endpoint=False).astype(np.int64)
        self.sums = np.add.reduceat(values * weights, starts)
        self.weights = np.add.reduceat(weights, starts)
        # The means of as many consecutive values, from each value on. Single values stay exact.
        self.smooth = values
        if self.size > 1:
            self.smooth = _moving(values * weights, self.size) / _moving(weights, self.size)


def rise_of(series: Series) -> Rise:
    """Whether a series has left its lowest level.

    Args:
        series: at least one value.

    Returns:
        The rise. With fewer than `MIN_VALUES` values, it is that of the last value above the lowest
        one, and its limit is infinite unless both have a standard error.
    """
    steps, values, weights, _ = series
    blocks = _Blocks(values, weights)
    low = int(blocks.smooth.argmin())
    if len(values) < MIN_VALUES:
        change, limit, level = values[-1] - values[low], _limit_of_few(series, low), values[low]
    else:
        change, error, level = _rise(blocks.sums, blocks.weights)
        limit = error * _critical("rise", len(blocks.sums), min(blocks.size, _MAX_SIZE))
    return Rise(
        change=float(change),
        limit=float(limit),
        level=float(level),
        low_step=int(steps[low + blocks.size // 2]),
        low=float(blocks.smooth[low]),
        last=float(blocks.smooth[-1]),
    )


def difference(one: Series, other: Series) -> Difference | None:
    """Compare two series over their common steps.

    If one of them has fewer than `MIN_VALUES` values there, the last ones of a common step are
    compared.

    Returns:
        None if there are none, or if they have no standard errors.
    """
    first = max(int(series.steps[0]) if len(series.steps) else 0 for series in (one, other))
    last = min(int(series.steps[-1]) if len(series.steps) else -1 for series in (one, other))
    both = [_between(series, first, last) for series in (one, other)]
    if min(len(series.steps) for series in both) < MIN_VALUES:
        return _difference_of_last(*both)
    means, variances, counts, sizes = [], [], [], []
    for series in both:
        blocks = _Blocks(series.values, series.weights)
        third = len(blocks.sums) // 3
        means.append(blocks.sums[-third:].sum() / blocks.weights[-third:].sum())
        variances.append(_noise(blocks.sums / blocks.weights) / third)
        counts.append(len(blocks.sums))
        sizes.append(blocks.size)
    error = math.sqrt(sum(variances))
    return Difference(
        change=float(means[0] - means[1]),
        limit=error * _critical("difference", min(counts), min(*sizes, _MAX_SIZE)),
        level=float(means[1]),
        last_step=last,
    )


def _limit_of_few(series: Series, low: int) -> float:
    """How far the last value is above the lowest one by chance, given their standard errors.

    Each value before it may be the lowest one, so there are as many comparisons.
    """
    others = len(series.values) - 1
    if series.errors is None or not others:
        return math.inf
    error = math.hypot(series.errors[low], series.errors[-1])
    return error * _quantile(LEVEL / others) if math.isfinite(error) else math.inf


def _difference_of_last(one: Series, other: Series) -> Difference | None:
    """At the last step that both have."""
    common, here, there = np.intersect1d(one.steps, other.steps, return_indices=True)
    if one.errors is None or other.errors is None or not len(common):
        return None
    here, there = here[-1], there[-1]
    error = math.hypot(one.errors[here], other.errors[there])
    if not math.isfinite(error):
        return None
    return Difference(
        change=float(one.values[here] - other.values[there]),
        limit=error * _quantile(LEVEL),
        level=float(other.values[there]),
        last_step=int(common[-1]),
    )


def _quantile(level: float) -> float:
    """What the normal distribution exceeds with this probability."""
    return NormalDist().inv_cdf(1 - level)


def _between(series: Series, first: int, last: int) -> Series:
    steps, values, weights, errors = series
    inside = (steps >= first) & (steps <= last)
    return Series(
        steps[inside],
        values[inside],
        None if weights is None else weights[inside],
        None if errors is None else errors[inside],
    )


def _rise(sums: Any, weights: Any) -> tuple[Any, Any, Any]:
    """The change, its standard error, and the lowest level, of blocks [..., B]."""
    count = sums.shape[-1]
    third = count // 3
    stretches = _moving(sums, third) / _moving(weights, third)
    level = stretches[..., : count - 2 * third + 1].min(axis=-1)
    error = np.sqrt(_noise(sums / weights) * 2 / third)
    return stretches[..., -1] - level, error, level


def _noise(means: Any) -> Any:
    """The variance of blocks [..., B] around their trend.

    The first third is left out, because a loss falls so steeply there that its bends are no noise.
    A bend a - 2b + c has the variance 1 + 4 + 1.
    """
    bends = np.diff(means, 2, axis=-1)[..., means.shape[-1] // 3 :]
    return (bends**2).mean(axis=-1) / 6


def _moving(values: Any, width: int) -> Any:
    sums = np.cumsum(values, axis=-1)
    sums = np.concatenate([np.zeros((*sums.shape[:-1], 1)), sums], axis=-1)
    return sums[..., width:] - sums[..., :-width]


@lru_cache(maxsize=64)
def _critical(kind: str, count: int, size: int) -> float:
    """What a `rise` or `difference` in standard errors stays below in 99 of 100 series of noise.

    The series have `count` blocks of `size` values. The draws are the same each time.
    """
    generator = np.random.default_rng(0)
    one, other = (_drawn(generator, count, size) for _ in range(2))
    if kind == "rise":
        change, error, _ = _rise(one, np.ones(count))
    else:
        third = count // 3
        change = one[:, -third:].mean(axis=1) - other[:, -third:].mean(axis=1)
        error = np.sqrt((_noise(one) + _noise(other)) / third)
    return float(np.quantile(change / error, 1 - LEVEL))


def _drawn(generator: np.random.Generator, count: int, size: int) -> Any:
    """The block means [draws, count] of noise whose neighbours correlate."""
    noise = generator.standard_normal((count * size, _DRAWS))
    noise[0] /= math.sqrt(1 - CORRELATION**2)
    for now in range(1, len(noise)):
        noise[now] += CORRELATION * noise[now - 1]
    return noise.reshape(count, size, _DRAWS).mean(axis=1).T
