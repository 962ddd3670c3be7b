"""The interval of a mean over tokens: against the formula written out, tables, and simulation."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics.core.intervals import Interval, moments, ratio_interval, student_t

# From the table in Abramowitz and Stegun (26.10), two-sided 95 %.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 60: 2.0}


@pytest.mark.parametrize(("freedom", "quantile"), TABLE.items())
def test_quantiles_of_student(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, abs=6e-4)


def test_quantiles_fall_to_that_of_the_normal_distribution() -> None:
    quantiles = [student_t(freedom) for freedom in range(1, 200)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert student_t(10**9) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=3e-3)


def naive(sequences: list[tuple[float, int]]) -> tuple[float, float]:
    """Mean over tokens and half width, with a loop over (sum of values, tokens)."""
    used = [(y, n) for y, n in sequences if n]
    total = sum(n for _, n in used)
    mean = sum(y for y, _ in used) / total
    squares = sum((y - mean * n) ** 2 for y, n in used)
    variance = len(used) / (len(used) - 1) * squares / total**2
    return mean, student_t(len(used) - 1) * math.sqrt(variance)


def interval_of(sequences: list[tuple[float, int]], **limits: float) -> Interval | None:
    values, tokens = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*sequences, strict=True)
    )
    return ratio_interval(moments(values, tokens).tolist(), **limits)


SEQUENCES = st.lists(
    st.tuples(st.floats(0, 1e3), st.integers(0, 500)), min_size=2, max_size=40
).filter(lambda found: sum(n > 0 for _, n in found) >= 2)


@given(SEQUENCES)
def test_interval_is_the_formula(sequences: list[tuple[float, int]]) -> None:
    sequences = [(y if n else 0.0, n) for y, n in sequences]
    mean, half = naive(sequences)
    found = interval_of(sequences)
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == pytest.approx(mean)
    # Squares that cancel leave the root of the rounding of float64.
    near = 1e-6 * max(y for y, _ in sequences)
    assert found.high - found.value == pytest.approx(half, rel=1e-6, abs=near)
    assert found.value - found.low == pytest.approx(half, rel=1e-6, abs=near)


@given(SEQUENCES, st.integers(0, 40))
def test_moments_of_parts_add_up(sequences: list[tuple[float, int]], cut: int) -> None:
    values, tokens = (torch.tensor(c, dtype=torch.float64) for c in zip(*sequences, strict=True))
    parts = moments(values[:cut], tokens[:cut]) + moments(values[cut:], tokens[cut:])
    torch.testing.assert_close(parts, moments(values, tokens))


def test_without_tokens_or_with_one_sequence() -> None:
    assert interval_of([(0.0, 0), (0.0, 0)]) is None
    assert interval_of([(6.0, 3), (0.0, 0)]) == Interval(2.0, None, None)


def test_limits_cut_the_interval() -> None:
    found = interval_of([(0.0, 4), (4.0, 4)], lowest=0.0, highest=1.0)
    assert found == Interval(0.5, 0.0, 1.0, error=0.5)


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, 0.6024), (1, 0.3976, 1.0)])
def test_interval_where_all_tokens_are_alike(right: int, low: float, high: float) -> None:
    """Clopper and Pearson for 4 draws: 0.025 ** (1 / 4) is 0.3976."""
    found = interval_of([(right * n, n) for n in (3, 5, 7, 9)], lowest=0.0, highest=1.0)
    assert found is not None and found.value == right
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_interval_covers_the_truth_where_tokens_are_correlated() -> None:
    """Sequences with a level of their own: 95 % covered, and by far not if tokens were counted."""
    rng = random.Random(0)
    covered = covered_by_tokens = 0
    for _ in range(600):
        tokens = [[5 + level + rng.gauss(0, 1) for _ in range(30)] for level in _levels(rng, 12)]
        found = interval_of([(sum(values), len(values)) for values in tokens])
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low <= 5 <= found.high
        flat = [value for values in tokens for value in values]
        half = 1.96 * statistics.stdev(flat) / math.sqrt(len(flat))
        covered_by_tokens += abs(statistics.fmean(flat) - 5) <= half
    assert 0.92 < covered / 600 < 0.98
    assert covered_by_tokens / 600 < 0.5


def _levels(rng: random.Random, count: int) -> list[float]:
    return [rng.gauss(0, 1) for _ in range(count)]
