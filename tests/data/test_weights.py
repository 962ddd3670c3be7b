"""How weights follow from scores: bounds, smoothing, the rules' arithmetic."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics.data.weights import (
    POINTS,
    Point,
    add_point,
    bounded,
    excess_scores,
    followed,
    speed,
)

FREE = {"smoothing": 0.0, "least": 0.0, "most": 1.0}
NUMBERS = st.lists(st.floats(0, 1e6), min_size=1, max_size=8)


@given(NUMBERS, st.floats(0, 1), st.floats(0, 1))
def test_bounds_hold_and_the_sum_is_one(numbers: list[float], low: float, high: float) -> None:
    count = len(numbers)
    least, most = low / count, 1 / count + high * (1 - 1 / count)
    found = bounded({str(i): n for i, n in enumerate(numbers)}, least, most)
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
    for value in found.values():
        assert least - 1e-9 <= value <= most + 1e-9
    # A higher number never gets a lower weight.
    by_number = sorted(zip(numbers, found.values(), strict=True))
    assert all(a[1] <= b[1] + 1e-12 for a, b in pairwise(by_number))


def test_weights_inside_the_bounds_stay() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert bounded(weights, 0.1, 0.6) == pytest.approx(weights, abs=1e-12)


def test_scores_share_the_weight_of_their_channels() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert followed(weights, {"a": 1.0, "b": 3.0}, **FREE) == pytest.approx(
        {"a": 0.2, "b": 0.6, "c": 0.2}
    ), "c was not in the window, so nothing new is known of it"
    assert followed(weights, {"a": 0.0, "b": 0.0}, **FREE) == pytest.approx(weights)
    half = followed(weights, {"a": 1.0, "b": 3.0}, smoothing=0.5, least=0.0, most=1.0)
    assert half == pytest.approx({"a": 0.35, "b": 0.45, "c": 0.2})


def test_exponentiated_gradient_is_that_of_the_paper() -> None:
    """DoReMi: alpha * exp(eta * lambda), normalised; an excess below 0 counts as 0."""
    weights, excess = {"a": 0.5, "b": 0.25, "c": 0.25}, {"a": 0.2, "b": 0.7, "c": -3.0}
    found = followed(weights, excess_scores(weights, excess, 2.0), **FREE)
    raw = {"a": 0.5 * math.exp(0.4), "b": 0.25 * math.exp(1.4), "c": 0.25}
    assert found == pytest.approx({n: v / sum(raw.values()) for n, v in raw.items()})
    assert followed(weights, excess_scores(weights, {"a": 1e9}, 1.0), **FREE) == pytest.approx(
        weights
    )


def curve(floor: float, factor: float, power: float, count: int) -> list[Point]:
    points: list[Point] = []
    for number in range(1, count + 1):
        so_far = 1000.0 * number
        add_point(points, so_far, 1000 * (floor + factor * so_far**-power), 1000)
    return points


@pytest.mark.parametrize("floor", [0.0, 1.5])
@pytest.mark.parametrize("power", [0.1, 0.35, 0.7])
def test_the_speed_of_a_power_law(power: float, floor: float) -> None:
    """Only the part that falls has a speed. Added-up points cost some of the precision."""
    for count, precision in ((60, 0.05), (200, 0.11)):
        now = 1000.0 * count
        found = speed(curve(floor, 20.0, power, count), now)
        assert found == pytest.approx(power * 20 * now ** (-power - 1), rel=precision)


def test_what_does_not_fall_has_no_speed() -> None:
    rng = random.Random(0)
    rising: list[Point] = []
    for number in range(1, 50):
        add_point(rising, 1000.0 * number, 1000 * (2 + 0.01 * number + rng.random() / 100), 1000)
    assert speed(rising, 50_000.0) == 0.0
    assert speed(rising[:3], 3000.0) is None, "too few points"
    assert speed([[1.0, 0.0, 1.0]] * 4, 10.0) == 0.0, "a loss of 0 cannot fall"


def test_points_are_added_up_not_dropped() -> None:
    points: list[Point] = []
    for number in range(1, 1001):
        add_point(points, float(number), 2.0 * number, 3.0)
        assert number > POINTS or len(points) == number
    assert 2 < len(points) <= POINTS
    assert sum(nll for _, nll, _ in points) == 2.0 * 500 * 1001
    assert sum(tokens for *_, tokens in points) == 3000
