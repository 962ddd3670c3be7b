"""The sequential test of alerts: its rate of errors, and that it finds rises."""

from __future__ import annotations

import json
import math
import random

import pytest

from benchmarks.alarms import delays, false_alarms
from channel_metrics.observers.rises import (
    _widening,
    add,
    forget,
    group_rate,
    merged,
    new_state,
    tail,
)


@pytest.mark.parametrize("is_falling", [False, True])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.5])
def test_at_most_the_stated_rate_of_runs_has_a_false_alarm(
    correlation: float, is_falling: bool
) -> None:
    """One run in twenty, of 200; benchmarks/alarms.py does it with longer runs."""
    assert false_alarms(200, 5, 120, correlation, is_falling=is_falling) <= 10


def test_the_rates_add_up_to_that_of_the_run() -> None:
    groups = sum(3 * group_rate(0.05, group, 3) for group in range(1, 10_000))
    assert 0.049 < groups < 0.05


@pytest.mark.parametrize(("rise", "windows"), [(30, 4), (10, 4), (5, 16)])
def test_a_rise_is_found_in_time(rise: float, windows: int) -> None:
    for correlation in (0.0, 0.5):
        assert sorted(delays(15, 10, correlation, rise))[7] <= windows


@pytest.mark.parametrize(
    ("freedom", "value", "chance"),
    # From tables of Student's distribution.
    [(2, 2.919986, 0.05), (2, 31.59905, 5e-4), (8, 2.306004, 0.025), (16, 4.014996, 5e-4)],
)
def test_the_tail_is_that_of_students_distribution(
    freedom: int, value: float, chance: float
) -> None:
    assert tail(value, freedom) == pytest.approx(chance, rel=1e-5)


def test_far_out_the_tail_is_that_of_the_density() -> None:
    def density(t: float) -> float:
        scale = math.gamma(33 / 2) / math.gamma(16) / math.sqrt(32 * math.pi)
        return float(scale * (1 + t * t / 32) ** (-33 / 2))

    area = sum(density(6 + (i + 0.5) / 100) for i in range(4000)) / 100
    assert tail(6.0, 32) == pytest.approx(area, rel=1e-4) and area < 1e-6


def test_the_widening_is_that_of_correlated_noise() -> None:
    """By simulation: the difference of the means / its error, if all pairs were independent."""
    for size in (1, 4):
        draw, differences, squares = random.Random(0), [], []
        for _ in range(4000):
            noise = [draw.gauss(0, 1)]
            for _ in range(16 * size - 1):
                noise.append(0.5 * noise[-1] + math.sqrt(0.75) * draw.gauss(0, 1))
            means = [sum(noise[i * size : (i + 1) * size]) / size for i in range(16)]
            differences.append(sum(means[12:]) / 4 - sum(means[:12]) / 12)
            squares += [(means[i + 1] - means[i]) ** 2 for i in range(0, 16, 2)]
        true = sum(d * d for d in differences) / len(differences)
        taken = sum(squares) / 2 / len(squares) * (1 / 4 + 1 / 12)
        assert _widening(size) == pytest.approx(math.sqrt(true / taken), rel=0.05)


def test_a_loss_that_falls_or_stays_has_no_rise_and_small_changes_are_none() -> None:
    state = new_state(0.05)
    for window in range(300):
        assert add(state, [10 / (1 + window), 1.0]) is None
    state = new_state(0.05)
    for window in range(300):
        assert add(state, [2.0 + (0.015 if window > 100 else 0), 1.0]) is None, "less than 1 %"


def test_what_a_rise_says() -> None:
    state = new_state(0.05)
    draw = random.Random(1)
    for window in range(40):
        noise = draw.gauss(0, 0.01)
        block = [2 + noise + (window >= 36), 4.0, 5.0 - window, None]
        found = add(state, block)
    assert found is not None and found.windows == 4 and found.before == pytest.approx(2, abs=0.02)
    assert found.now == pytest.approx(3, abs=0.02) and found.partners == (-8.0, None)
    assert json.loads(json.dumps(state)) == state
    forget(state)
    assert all(add(state, [3.0, 1.0, 0.0, 0.0]) is None for _ in range(40))


def test_a_small_rise_is_seen_in_the_means_of_many_windows() -> None:
    """A third of the standard deviation of their noise: the last scale, of 128 windows, tells."""
    state, draw = new_state(0.05), random.Random(0)
    losses = [2 + draw.gauss(0, 0.09) + (0.03 if window >= 1536 else 0) for window in range(2048)]
    *before, last = (add(state, [loss, 1.0]) for loss in losses)
    assert not any(before) and last is not None and last.windows == 512


def test_the_state_does_not_grow() -> None:
    state, draw, sizes = new_state(1e-6), random.Random(0), []
    for window in range(1, 8001):
        add(state, [2 + draw.gauss(0, 0.3), 1e6 + window, draw.random(), draw.random()])
        if window % 4000 == 0:
            sizes.append(len(json.dumps(state)))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02) and sizes[1] < 3500


def test_merging_weighs_the_loss() -> None:
    assert merged([1.0, 3.0, 2.0, None], [5.0, 1.0, 4.0, None]) == [2.0, 4.0, 3.0, None]


def chance(series: list[float], size: int, squares: int) -> float:
    """Of the last test for means of `size` windows, with the differences of so many pairs."""
    means = [sum(series[i : i + size]) / size for i in range(0, len(series), size)]
    pairs = [*zip(means[::2], means[1::2], strict=True)][-squares:]
    deviation = math.sqrt(sum((b - a) ** 2 for a, b in pairs) / 2 / squares)
    rise = sum(means[-4:]) / 4 - sum(means[-16:-4]) / 12
    t = rise / (_widening(size) * deviation * math.sqrt(1 / 4 + 1 / 12))
    return tail(t, squares - squares % 2)


def least_rate(series: list[float], windows: int) -> float:
    """With which the last window shows the rise, found by halving."""
    low, high, found = 0.0, 1.0, None
    for _ in range(40):
        state = new_state((low + high) / 2)
        rise = [add(state, [loss, 1.0]) for loss in series][-1]
        low, high = (low, state["rate"]) if rise is not None else (state["rate"], high)
        found = rise or found
    assert found is not None and found.windows == windows
    return high


@pytest.mark.parametrize(
    ("count", "size", "squares", "part"),
    [
        (16, 1, 8, 1 / (1 * 2) / (1 * 2)),  # the first test of single windows
        (18, 1, 9, 1 / (1 * 2) / (2 * 3)),  # the second
        (32, 2, 8, 1 / (2 * 3) / (1 * 2)),  # the first test of pairs
        (94, 1, 47, 1 / (1 * 2) / (40 * 41)),
        (96, 1, 24, 1 / (1 * 2) / (41 * 42)),  # the squares of the first 24 pairs are forgotten
    ],
)
def test_each_test_has_its_part_of_the_rate(
    count: int, size: int, squares: int, part: float
) -> None:
    draw = random.Random(count)
    series = [2 + draw.gauss(0, 0.03 if n < 48 <= count - 17 else 0.02) for n in range(count)]
    series = [loss + (0.12 if n >= count - 4 * size else 0) for n, loss in enumerate(series)]
    found = least_rate(series, 4 * size)
    assert found == pytest.approx(chance(series, size, squares) / part, rel=1e-3)
