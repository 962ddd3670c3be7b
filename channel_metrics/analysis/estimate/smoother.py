"""Fits curves to weighted sums of them, with a Kalman smoother in information form.

C curves are linear between G knots. Each datum is a weighted sum of their values at one time, with
noise. From knot to knot, the curves do a random walk, which has a part that all curves share, and a
part of each curve's own. The smoother is that of Rauch, Tung and Striebel (1965), written as block
elimination of a tridiagonal system. It takes O(G C^3) time and O(G C^2) memory for any number of
data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Equations", "Fit", "Rows", "Walk", "equations_of", "fit_curves"]

Floats = NDArray[np.float64]

_CHUNK = 4096


class Rows(NamedTuple):
    """T weighted sums."""

    positions: Floats
    """[T], increasing: knot 0 is at 0, the last at G - 1."""

    values: Floats
    """[T], the sums with their noise; around 0, where the walks begin."""

    weights: NDArray[np.floating]
    """[T, C]."""

    variances: Floats
    """[T], of the noise, up to a factor."""


class Equations(NamedTuple):
    """The normal equations of the data, without the walk."""

    diagonal: Floats  # [G, C, C]
    above: Floats  # [G - 1, C, C]
    right: Floats  # [G, C]
    num_rows: int
    squares: float  # sum of value^2 / variance


class Walk(NamedTuple):
    """Standard deviations, in units of the noise."""

    level: float  # of the differences between the curves at knot 0
    shared: float  # of the shared part of the walk from the first knot to the last
    own: float  # of each curve's own part


class Fit(NamedTuple):
    """The posterior of the curves for one walk."""

    log_likelihood: float
    scale: float  # the factor of the variances
    mean: Floats  # [G, C]
    variance: Floats  # [G, C]


def equations_of(rows: Rows, num_knots: int) -> Equations:
    """The equations of the data for the knots. The data may be on disk; they are read in parts."""
    channels = rows.weights.shape[1]
    diagonal = np.zeros((num_knots, channels, channels))
    above = np.zeros((num_knots - 1, channels, channels))
    right = np.zeros((num_knots, channels))
    cells = np.minimum(rows.positions.astype(np.int64), num_knots - 2)
    after = rows.positions - cells
    bounds = np.searchsorted(cells, np.arange(num_knots))
    for cell in range(num_knots - 1):
        for first in range(bounds[cell], bounds[cell + 1], _CHUNK):
            part = slice(first, min(first + _CHUNK, bounds[cell + 1]))
            mix = rows.weights[part].astype(np.float64)
            precision = 1 / rows.variances[part]
            late = after[part]
            gram = [
                (mix * (one * other * precision)[:, None]).T @ mix
                for one, other in ((1 - late, 1 - late), (late, late), (1 - late, late))
            ]
            diagonal[cell] += gram[0]
            diagonal[cell + 1] += gram[1]
            above[cell] += gram[2]
            right[cell] += ((1 - late) * precision * rows.values[part]) @ mix
            right[cell + 1] += (late * precision * rows.values[part]) @ mix
    squares = float((rows.values**2 / rows.variances).sum())
    return Equations(diagonal, above, right, len(rows.values), squares)


def fit_curves(equations: Equations, walk: Walk) -> Fit:
    """Mean and variance of the curves at the knots, and the likelihood of the walk.

    The factor of the variances is the most likely one.
    """
    num_knots, channels = equations.right.shape
    step = math.sqrt(1 / (num_knots - 1))
    steps, log_steps = _inverse(walk.shared * step, walk.own * step, channels)
    start, log_start = _inverse(3 * walk.level, walk.level, channels)
    diagonal = equations.diagonal.copy()
    diagonal[0] += start
    diagonal[:-1] += steps
    diagonal[1:] += steps
    above = equations.above - steps
    # Forward: eliminate knot after knot.
    pivots, right = np.empty_like(diagonal), equations.right.copy()
    log_det = 0.0
    for knot in range(num_knots):
        block = diagonal[knot]
        if knot:
            gain = pivots[knot - 1] @ above[knot - 1]
            block = block - above[knot - 1].T @ gain
            right[knot] -= gain.T @ right[knot - 1]
        log_det += float(np.linalg.slogdet(block)[1])
        inverse = np.linalg.inv(block)
        pivots[knot] = (inverse + inverse.T) / 2
    # Backward: the smoother.
    mean, variance = np.empty_like(right), np.empty_like(right)
    covariance = pivots[-1]
    mean[-1], variance[-1] = covariance @ right[-1], np.diag(covariance)
    for knot in range(num_knots - 2, -1, -1):
        gain = pivots[knot] @ above[knot]
        mean[knot] = pivots[knot] @ right[knot] - gain @ mean[knot + 1]
        covariance = pivots[knot] + gain @ covariance @ gain.T
        variance[knot] = np.diag(covariance)
    squares = equations.squares - float((equations.right * mean).sum())
    scale = max(squares, 1e-300) / equations.num_rows
    log_prior = log_start + (num_knots - 1) * log_steps
    log_likelihood = -0.5 * (equations.num_rows * math.log(scale) + log_det - log_prior)
    return Fit(log_likelihood, scale, mean, np.maximum(variance, 0) * scale)


def _inverse(shared: float, own: float, channels: int) -> tuple[Floats, float]:
    """Inverse of shared^2 11' + own^2 I, and the logarithm of the inverse's determinant."""
    common = shared**2 / (own**2 * (own**2 + channels * shared**2))
    log_det = (channels - 1) * math.log(own**2) + math.log(own**2 + channels * shared**2)
    return np.eye(channels) / own**2 - common, -log_det
