"""The mean over tokens and its confidence interval, for tokens that come in sequences.

Letters: m sequences; sequence i has n_i tokens and the sum y_i of their values.

The mean is r = sum(y_i) / sum(n_i). The token losses of one sequence resemble each other, so tokens
are not independent draws, and s / sqrt(tokens) would be far too small. Sequences are independent.
r is a ratio of two sums over sequences, and its variance is that of the linearised ratio estimator,

    v = m / (m - 1) * sum((y_i - r n_i)^2) / (sum n_i)^2

(W. G. Cochran, Sampling Techniques, 3rd edition, 1977, chapter 6, without the correction for finite
populations: the interval is about the source that the dataset was drawn from). The interval is
r +- t * sqrt(v), with the quantile of Student's t with m - 1 degrees of freedom.

If all values are the lowest or the highest possible ones (no token of the sample was predicted, for
instance), v is 0, and an interval without width would be wrong. Then each sequence counts as one
draw, and the interval is the exact one for m draws with the same result: its width is
1 - 0.025^(1/m) of the possible range (C. J. Clopper and E. S. Pearson, Biometrika 26, 1934).

>>> sums = moments(torch.tensor([4.0, 6.0]), torch.tensor([2.0, 2.0]))
>>> found = ratio_interval(sums.tolist())
>>> round(found.value, 3), round(found.high, 3)
(2.5, 8.853)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MOMENTS", "Interval", "moments", "ratio_interval", "student_t"]

# Sums over the sequences that have tokens. The sums of two ranks may be added.
MOMENTS = ("sequences", "n", "n_squared", "y", "y_squared", "y_times_n")
# From here on, one more degree of freedom changes the quantile by less than a thousandth.
_MAX_FREEDOM = 1_000


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % confidence interval and its standard error.

    low, high: None where fewer than two sequences have tokens. error: None there, too, and where
    all values are the lowest or the highest possible ones.
    """

    value: float
    low: float | None
    high: float | None
    error: float | None = None


def moments(values: Tensor, tokens: Tensor) -> Tensor:
    """[6], the sums that `MOMENTS` names.

    Args:
        values: [m], the sum of the values of each sequence.
        tokens: [m], the number of tokens of each sequence.
    """
    used = (tokens > 0).to(tokens)
    columns = (used, tokens, tokens * tokens, values, values * values, values * tokens)
    return torch.stack([column.sum() for column in columns])


def ratio_interval(
    sums: Sequence[float], *, lowest: float = -math.inf, highest: float = math.inf
) -> Interval | None:
    """The mean over tokens and its 95 % interval; None without tokens.

    Args:
        sums: the six sums of `moments`.
        lowest: the lowest possible mean. The interval does not go below it.
        highest: the highest possible mean. The interval does not go above it.
    """
    m, n, n_squared, y, y_squared, y_times_n = sums
    if not n:
        return None
    mean = y / n
    if m < 2:
        return Interval(mean, None, None)
    if mean in (lowest, highest) and math.isfinite(highest - lowest):
        width = (highest - lowest) * (1 - 0.025 ** (1 / m))
        return Interval(mean, max(mean - width, lowest), min(mean + width, highest))
    squares = max(y_squared - 2 * mean * y_times_n + mean * mean * n_squared, 0.0)
    error = math.sqrt(m / (m - 1) * squares) / n
    half = student_t(round(m) - 1) * error
    return Interval(mean, max(mean - half, lowest), min(mean + half, highest), error)


@functools.cache
def student_t(freedom: int) -> float:
    """The t for which Student's distribution has 95 % between -t and t.

    It is found by bisection of the finite series in Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.3 and 26.7.4. More than 1,000 degrees of freedom count as 1,000.
    """
    freedom = min(freedom, _MAX_FREEDOM)
    low, high = 1.0, 13.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, freedom) < 0.95 else (low, middle)
    return high


def _between(t: float, freedom: int) -> float:
    """The probability of values between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
