"""The smoother against one dense matrix, which knows nothing of one knot after another."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from channel_metrics.analysis.estimate.smoother import Rows, Walk, equations_of, fit_curves

KNOTS, CHANNELS, ROWS = 5, 3, 17
WALK = Walk(level=2.0, shared=1.5, own=0.7)
Floats = NDArray[np.float64]


def prior() -> Floats:
    """Covariance of all knots and curves, [G * C, G * C]: a level, and sums of increments."""
    ones, eye = np.ones((CHANNELS, CHANNELS)), np.eye(CHANNELS)
    level = 9 * WALK.level**2 * ones + WALK.level**2 * eye
    increment = (WALK.shared**2 * ones + WALK.own**2 * eye) / (KNOTS - 1)
    blocks = [
        [level + min(first, second) * increment for second in range(KNOTS)]
        for first in range(KNOTS)
    ]
    return np.block(blocks)


def design(rows: Rows) -> Floats:
    found = np.zeros((ROWS, KNOTS, CHANNELS))
    for row, position in enumerate(rows.positions):
        for knot in range(KNOTS):
            found[row, knot] = max(0.0, 1 - abs(position - knot)) * rows.weights[row]
    return found.reshape(ROWS, -1)


@pytest.fixture
def rows() -> Rows:
    rng = np.random.default_rng(0)
    positions = np.sort(np.append(rng.uniform(0, KNOTS - 1, ROWS - 2), [0, KNOTS - 1]))
    weights = rng.dirichlet(np.ones(CHANNELS), ROWS)
    return Rows(positions, rng.normal(size=ROWS), weights, rng.uniform(0.5, 2, ROWS))


def test_the_posterior_is_that_of_the_dense_matrix(rows: Rows) -> None:
    matrix, covariance = design(rows), prior()
    noise = np.diag(rows.variances)
    marginal = matrix @ covariance @ matrix.T + noise
    gain = covariance @ matrix.T @ np.linalg.inv(marginal)
    mean = gain @ rows.values
    variance = np.diag(covariance - gain @ matrix @ covariance)
    scale = rows.values @ np.linalg.solve(marginal, rows.values) / ROWS

    fit = fit_curves(equations_of(rows, KNOTS), WALK)
    assert fit.scale == pytest.approx(scale)
    assert fit.mean.ravel() == pytest.approx(mean)
    assert fit.variance.ravel() == pytest.approx(variance * scale)


def test_likelihoods_of_walks_differ_as_those_of_the_dense_matrix(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    equations, matrix = equations_of(rows, KNOTS), design(rows)
    differences = []
    for walk in (WALK, Walk(level=5.0, shared=0.2, own=2.0)):
        monkeypatch.setitem(globals(), "WALK", walk)
        marginal = matrix @ prior() @ matrix.T + np.diag(rows.variances)
        scale = rows.values @ np.linalg.solve(marginal, rows.values) / ROWS
        expected = -0.5 * (ROWS * math.log(scale) + np.linalg.slogdet(marginal)[1])
        differences.append(fit_curves(equations, walk).log_likelihood - expected)
    # Equal up to a constant, which the noise alone makes.
    assert differences[0] == pytest.approx(differences[1])


def test_rows_are_summed_in_parts_as_in_one(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = equations_of(rows, KNOTS)
    monkeypatch.setattr("channel_metrics.analysis.estimate.smoother._CHUNK", 2)
    in_parts = equations_of(rows, KNOTS)
    for name in whole._fields:
        one, other = getattr(whole, name), getattr(in_parts, name)
        assert np.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_curve_that_no_row_speaks_of_is_as_uncertain_as_before(rows: Rows) -> None:
    silent = rows._replace(weights=rows.weights * [1, 1, 0])
    fit = fit_curves(equations_of(silent, KNOTS), WALK)
    # It keeps its own level and walk; what all share is known from the others.
    own = (WALK.level**2 + WALK.own**2) * fit.scale
    assert fit.variance[-1, 2] > own
    assert fit.variance[-1, 0] < own
