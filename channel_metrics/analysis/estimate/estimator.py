"""Estimates channel losses from the loss and the mix of each window.

The loss of a window is the token-weighted mean of the losses of its channels. Windows with
different mixes are therefore equations for the channel losses:

    y_t = sum_c w_tc mu_c(t) + e_t,    Var e_t = sigma^2 h_t / N_t

The curves mu_c are linear between knots, and do a random walk (see `smoother`). Losses change more
at the beginning of a training, so the knots may be denser there; the pace says how much. The pace
and the sizes of the walk are not known. If the mix hardly varies, the data do not determine them.
So we do not pick the best ones: we average over a grid, weighted by the marginal likelihood. The
bands then stay wide where the data say little.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from channel_metrics.analysis.estimate.smoother import (
    Equations,
    Rows,
    Walk,
    equations_of,
    fit_curves,
)
from channel_metrics.errors import ChannelMetricsError

__all__ = ["MIN_WINDOWS", "Estimate", "estimate_curves"]

Floats = NDArray[np.float64]

MIN_WINDOWS = 20

_Z95 = 1.959964
_MAX_KNOTS = 128
_WINDOWS_PER_KNOT = 4
# For a pace, knots are evenly spaced in log(1 + pace * time).
_PACES = (0.0, 10.0, 100.0)
# Standard deviations of the walks over the whole run, divided by the range of the loss.
_SHARED_WALKS = (0.3, 1.0, 3.0)
_OWN_WALKS = (0.1, 0.3, 1.0)
# The distance that channels may have at the start, as a multiple of the loss.
_LEVEL = 3.0
# For more channels the grid is smaller, because each point costs more.
_MANY_CHANNELS = 64
# Points of the grid with a smaller weight are left out.
_MIN_WEIGHT = 1e-3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Curves of P points for C channels."""

    steps: NDArray[np.int64]
    """[P], strictly increasing."""

    loss: Floats
    """[P, C], nats per token."""

    low: Floats
    """[P, C], lower end of the 95 % band of the expected loss; not below 0."""

    high: Floats
    """[P, C], upper end."""

    identifiable: NDArray[np.bool_]
    """[P, C]: the half-width of the band is at most `limit` times the loss of the whole run."""

    noise: float
    """Standard deviation of the loss of a typical window around its expectation, in nats."""


class _Data(NamedTuple):
    time: Floats  # [T], 0..1
    losses: Floats  # [T], minus their mean
    weights: NDArray[np.floating]  # [T, C]
    variances: Floats  # [T], of the noise, up to a factor
    center: float  # how large losses are


def estimate_curves(
    steps: NDArray[np.int64],
    losses: Floats,
    weights: NDArray[np.floating],
    tokens: Floats | None = None,
    *,
    limit: float = 0.25,
) -> Estimate:
    """Estimate the loss of each channel over the run.

    Args:
        steps: [T], increasing.
        losses: [T], of whole windows, in nats per token.
        weights: [T, C], the share of each channel in the tokens of the window; they sum to 1.
        tokens: [T], the tokens of the window. Larger windows are less noisy.
        limit: see `Estimate.identifiable`.

    Raises:
        ChannelMetricsError: for fewer than `MIN_WINDOWS` windows, other shapes, or values that
            are not finite.
    """
    _check(steps, losses, weights)
    time = (steps - steps[0]) / (steps[-1] - steps[0])
    sizes = np.ones(len(steps)) if tokens is None else np.maximum(tokens, 1.0)
    center = float(losses.mean())
    data = _Data(time, losses - center, weights, sizes.mean() / sizes, abs(center))
    knots = min(_MAX_KNOTS, max(8, len(steps) // _WINDOWS_PER_KNOT))
    unit = np.linspace(0, 1, knots)
    noise = _rough_noise(losses)
    # The first pass shows where the run is noisy; the second one gives the result.
    mean, _, noise = _average(data, noise, unit)
    residuals = data.losses - _predict(data, mean, unit)
    data = data._replace(variances=data.variances * _local_scale(residuals, data.variances))
    mean, variance, noise = _average(data, noise, unit)
    half = _Z95 * np.sqrt(variance)
    whole = np.interp(unit, time, _smooth(losses, max(5, len(losses) // 50)))
    knot_steps = np.rint(steps[0] + unit * (steps[-1] - steps[0])).astype(np.int64)
    distinct, places = np.unique(knot_steps, return_index=True)
    return Estimate(
        steps=distinct,
        loss=(mean + center)[places],
        low=np.maximum(mean + center - half, 0.0)[places],
        high=np.maximum(mean + center + half, 0.0)[places],
        identifiable=(half <= limit * whole[:, None])[places],
        noise=noise,
    )


def _check(steps: NDArray[np.int64], losses: Floats, weights: NDArray[np.floating]) -> None:
    if weights.shape[:1] != losses.shape or steps.shape != losses.shape or weights.ndim != 2:
        raise ChannelMetricsError(
            f"expected steps [T], losses [T] and weights [T, C], but got {steps.shape}, "
            f"{losses.shape} and {weights.shape}."
        )
    if len(losses) < MIN_WINDOWS:
        raise ChannelMetricsError(
            f"expected at least {MIN_WINDOWS} windows whose loss and mix are known, but there are "
            f"{len(losses)}; log more often, or give a longer run."
        )
    if not np.isfinite(losses).all() or not np.isfinite(weights).all():
        raise ChannelMetricsError("losses and weights must be finite; leave other windows out.")


def _average(data: _Data, noise: float, unit: Floats) -> tuple[Floats, Floats, float]:
    """Mean [P, C] and variance [P, C] at the times `unit`, and the noise, over the grid."""
    fits = []
    equations = {pace: _equations(data, pace, len(unit)) for pace in _PACES}
    for pace, walk in _grid(data, noise):
        knots = _warp_back(unit, pace)
        fits.append((knots, fit_curves(equations[pace], walk)))
    best = max(fit.log_likelihood for _, fit in fits)
    parts = [(math.exp(fit.log_likelihood - best), knots, fit) for knots, fit in fits]
    whole = sum(weight for weight, _, _ in parts)
    means, variances, noises, weights = [], [], [], []
    for weight, knots, fit in parts:
        if weight / whole >= _MIN_WEIGHT:
            weights.append(weight / whole)
            means.append(_at(unit, knots, fit.mean))
            variances.append(_at(unit, knots, fit.variance))
            noises.append(math.sqrt(fit.scale))
    shares = np.array(weights)[:, None, None] / sum(weights)
    mean = (shares * np.array(means)).sum(0)
    # The law of total variance.
    spread = (shares * (np.array(variances) + (np.array(means) - mean) ** 2)).sum(0)
    return mean, spread, float(np.dot(weights, noises) / sum(weights))


def _grid(data: _Data, noise: float) -> Iterator[tuple[float, Walk]]:
    """The points of the grid: a pace, and a walk in units of the noise."""
    scale = float(np.subtract(*np.quantile(data.losses, [0.95, 0.05]))) + noise
    # A wide prior: it must not narrow the bands where the mix says nothing.
    level = _LEVEL * data.center + scale
    few = data.weights.shape[1] <= _MANY_CHANNELS
    shared = _SHARED_WALKS if few else _SHARED_WALKS[1:2]
    own = _OWN_WALKS if few else _OWN_WALKS[1:]
    for pace, common, single in itertools.product(_PACES, shared, own):
        yield pace, Walk(level / noise, common * scale / noise, single * scale / noise)


def _equations(data: _Data, pace: float, num_knots: int) -> Equations:
    positions = _warp(data.time, pace) * (num_knots - 1)
    return equations_of(Rows(positions, data.losses, data.weights, data.variances), num_knots)


def _warp(time: Floats, pace: float) -> Floats:
    return time if not pace else np.log1p(pace * time) / math.log1p(pace)


def _warp_back(unit: Floats, pace: float) -> Floats:
    return unit if not pace else np.expm1(unit * math.log1p(pace)) / pace


def _at(unit: Floats, knots: Floats, values: Floats) -> Floats:
    """Values [G, C] at `knots`, taken at the times `unit`."""
    return np.stack([np.interp(unit, knots, column) for column in values.T], axis=1)


def _predict(data: _Data, mean: Floats, unit: Floats) -> Floats:
    """The loss that the curves give for each window, [T]."""
    found = np.zeros(len(data.losses))
    for channel in range(mean.shape[1]):
        found += data.weights[:, channel] * np.interp(data.time, unit, mean[:, channel])
    return found


def _rough_noise(losses: Floats) -> float:
    """The noise, from differences of neighbours. It may include changes of the mix."""
    found = float(np.median(np.abs(np.diff(losses)))) / 0.954
    return found or float(losses.std()) or 1e-6


def _local_scale(residuals: Floats, variances: Floats) -> Floats:
    """The variance of the noise at each window, relative to its mean; [T]."""
    squares = residuals**2 / variances
    width = max(25, len(squares) // 10)
    local = _smooth(squares, width)
    return np.maximum(local / local.mean(), 1e-3) if local.mean() > 0 else np.ones(len(local))


def _smooth(values: Floats, width: int) -> Floats:
    """The mean of the `width` neighbours, fewer at the ends; [T]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first = np.maximum(places - width // 2, 0)
    end = np.minimum(places + width // 2 + 1, len(values))
    return np.asarray((sums[end] - sums[first]) / (end - first))
