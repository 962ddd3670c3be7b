"""Means of stretches of a series, and the differences between them that noise explains.

A series is cut into up to 18 blocks of consecutive values, and the means of blocks are compared.
The noise is read off the bends (second differences) of these means, so a steady rise or fall is
no noise. A difference is more than noise if it is larger than 99 of 100 differences in series that
only scatter around a constant. Such series are drawn here, for each number of blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from channel_metrics.analysis.store import Steps, Values

__all__ = ["CORRELATION", "LEVEL", "MIN_VALUES", "Difference", "Rise", "difference", "rise_of"]

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


def rise_of(steps: Steps, values: Values, weights: Values | None = None) -> Rise:
    """Whether a series has left its lowest level.

    Args:
        steps: int64 [N], increasing, N > 0.
        values: float64 [N], finite.
        weights: float64 [N], such as the tokens of each value. All weigh the same if there are
            none, or if one is not above 0.

    Returns:
        The rise. With fewer than `MIN_VALUES` values, it is that of the last value above the lowest
        one, and its limit is infinite.
    """
    blocks = _Blocks(values, weights)
    low = int(blocks.smooth.argmin())
    if len(values) < MIN_VALUES:
        change, limit, level = values[-1] - values[low], math.inf, values[low]
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


def difference(
    one: tuple[Steps, Values, Values | None], other: tuple[Steps, Values, Values | None]
) -> Difference | None:
    """Compare two series, each given as (steps, values, weights), over their common steps.

    Returns:
        None if one of them has fewer than `MIN_VALUES` values there.
    """
    first = max(int(series[0][0]) if len(series[0]) else 0 for series in (one, other))
    last = min(int(series[0][-1]) if len(series[0]) else -1 for series in (one, other))
    means, variances, counts, sizes = [], [], [], []
    for steps, values, weights in (one, other):
        inside = (steps >= first) & (steps <= last)
        if inside.sum() < MIN_VALUES:
            return None
        blocks = _Blocks(values[inside], None if weights is None else weights[inside])
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
