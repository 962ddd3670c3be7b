"""Differences between means: what they are, and how often noise is taken for one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from paths import ROOT

from analysis.analysis_tools import run_of
from benchmarks.missed import CASES, COUNTS, RUNS, states
from channel_metrics.analysis.judging.means import (
    LEVEL,
    Difference,
    Rise,
    Series,
    difference,
    rise_of,
)
from channel_metrics.analysis.judging.trends import trends_of
from channel_metrics.analysis.run import Run

NUM_RUNS = 200


def steps_of(count: int) -> np.ndarray:
    return np.arange(1, count + 1)


def rise(values: list[float], weights: list[float] | None = None) -> Rise:
    array = None if weights is None else np.array(weights)
    return rise_of(Series(steps_of(len(values)), np.array(values), array))


def noise(generator: np.random.Generator, count: int, correlation: float) -> np.ndarray:
    """Stationary noise whose neighbours correlate."""
    values = generator.standard_normal(count + 100)
    for now in range(1, len(values)):
        values[now] += correlation * values[now - 1]
    return values[100:]


def stationary_run(generator: np.random.Generator, count: int, correlation: float) -> Run:
    """Two channels and ten evaluations of each, which scatter around constants."""
    keys = {"loss": count, "a_loss": count, "b_loss": count, "eval_a_loss": 10, "eval_b_loss": 10}
    history: list[dict[str, float]] = [{"step": step} for step in range(1, count + 1)]
    for place, (key, number) in enumerate(keys.items()):
        every = count // number
        for at, loss in enumerate(noise(generator, number, correlation).tolist(), 1):
            history[every * at - 1][key] = 1 + place + 0.1 * loss
    return run_of(history)


# What docs/report.md states.
@pytest.mark.parametrize(("correlation", "stated"), [(0.0, 0.01), (0.3, 0.02), (0.5, 0.05)])
def test_the_rate_of_false_alarms(correlation: float, stated: float) -> None:
    generator = np.random.default_rng(1)
    counts = [20, 40, 100, 400]
    trends = [
        trend
        for number in range(NUM_RUNS)
        for trend in trends_of(stationary_run(generator, counts[number % 4], correlation))
    ]
    alarms = [trend for trend in trends if trend.is_bad]
    assert len(trends) == 5 * NUM_RUNS
    assert len(alarms) <= stated * len(trends), (len(alarms), correlation)
    page = (ROOT / "docs/report.md").read_text(encoding="utf-8")
    assert f"| {stated:.0%} | {len(alarms) / len(trends):.1%} |".replace("%", " %") in page


@pytest.mark.parametrize(("count", "stated"), [(20, 24), (200, 10)])
def test_it_is_not_usable_where_neighbours_correlate_by_090(count: int, stated: int) -> None:
    generator = np.random.default_rng(3)
    trends = [
        trend for _ in range(300) for trend in trends_of(stationary_run(generator, count, 0.9))
    ]
    training = [trend for trend in trends if trend.split == "train"]
    assert len(training) == 900
    rate = sum(trend.is_bad for trend in training) / len(training)
    assert rate == pytest.approx(stated / 100, abs=0.02)
    page = (ROOT / "docs/report.md").read_text(encoding="utf-8")
    assert f"{stated} % " in page.partition("correlate by\n0.9")[2][:300]


@pytest.mark.parametrize(
    ("where", "rise", "count"),
    [("third", 3, 20), ("third", 1, 100), ("third", 1, 400), ("tenth", 3, 400)],
)
def test_how_many_rises_are_missed(where: str, rise: int, count: int) -> None:
    rows = json.loads((ROOT / "benchmarks/results/missed.json").read_text())["rows"]
    (stated,) = (
        row["states"]
        for row in rows
        if (row["where"], row["rise"], row["values"]) == (where, rise, count)
    )
    found = states(where, rise, count)
    assert found.get("worse", 0) == pytest.approx(stated.get("worse", 0), abs=0.01 * RUNS)
    assert rise == 1 or "steady" not in found


def test_no_large_rise_is_called_not_worse() -> None:
    """What docs/report.md says of the whole table."""
    rows = json.loads((ROOT / "benchmarks/results/missed.json").read_text())["rows"]
    assert len(rows) == len(CASES) * len(COUNTS)
    assert not any("steady" in row["states"] for row in rows if row["rise"] >= 2)
    ones = [row["states"].get("steady", 0) for row in rows if row["rise"] == 1]
    assert max(ones) == 28 == ones[-1]


def test_the_rate_of_false_differences() -> None:
    generator = np.random.default_rng(2)
    above = below = 0
    for number in range(1000):
        count = [8, 20, 60, 300][number % 4]
        one, other = (
            Series(steps_of(count), 2 + 0.1 * noise(generator, count, 0.3)) for _ in range(2)
        )
        found = difference(one, other)
        assert found is not None
        above += found.change > found.limit
        below += found.change < -found.limit
    assert max(above, below) <= LEVEL * 1000
    assert above + below > 0  # The interval is not simply endless.


def test_the_interval_holds_the_difference() -> None:
    generator = np.random.default_rng(3)
    curve = 1 + 2 * np.exp(-steps_of(200) / 50)
    held = 0
    for _ in range(NUM_RUNS):
        first, second = (curve * factor + noise(generator, 200, 0) * 0.1 for factor in (1, 1.18))
        found = difference(Series(steps_of(200), second), Series(steps_of(200), first))
        assert found is not None
        truth = 0.18 * curve[-66:].mean()
        held += abs(found.change - truth) <= found.limit
        assert found.change > found.limit
    assert held >= 0.98 * NUM_RUNS


def test_a_rise_is_the_last_third_above_the_lowest_stretch_before() -> None:
    found = rise([5, 3, 1, 1, 2, 2, 4, 4, 4])
    assert found.level == pytest.approx(4 / 3)
    assert found.change == pytest.approx(4 - 4 / 3)
    assert (found.low, found.low_step, found.last) == (1, 3, 4)


def test_means_are_weighted_by_tokens() -> None:
    values, tokens = [2.0, 1, 1, 3, 4, 8], [1.0, 1, 3, 1, 1, 3]
    found = rise(values, tokens)
    assert found.level == pytest.approx(1) and found.change == pytest.approx((4 + 24) / 4 - 1)
    assert rise(values, [1.0, 1, 0, 1, 1, 3]) == rise(values)


def test_long_series_have_means_of_an_eighteenth() -> None:
    values = [abs(step - 100) / 10 for step in range(1, 181)]
    found = rise(values)
    assert found.low_step == 100
    assert found.low == pytest.approx(sum(values[94:104]) / 10)
    assert found.last == pytest.approx(sum(values[-10:]) / 10)


def test_a_steady_fall_or_rise_is_no_noise() -> None:
    for slope in (-0.5, 0.5):
        found = rise([9 + slope * step for step in range(12)])
        assert found.limit == pytest.approx(0, abs=1e-9)
        assert math.copysign(1, found.change) == math.copysign(1, slope)


def test_a_steep_beginning_is_no_noise() -> None:
    generator = np.random.default_rng(4)
    steps = steps_of(200)
    losses = 3 + 8 * np.exp(-steps / 7) + 0.4 * np.maximum(0, steps / 200 - 0.5)
    found = rise_of(Series(steps, losses + 0.05 * generator.standard_normal(200)))
    assert found.change > found.limit
    assert found.last - found.low == pytest.approx(0.2, abs=0.05)


def test_few_values_tell_nothing() -> None:
    found = rise([1, 2, 3, 4, 5])
    assert found.limit == math.inf and found.change == 4
    short, long = (Series(steps_of(n), np.ones(n)) for n in (5, 6))
    assert difference(short, long) is None
    assert isinstance(difference(long, long), Difference)


def test_runs_are_compared_over_their_common_steps() -> None:
    long = Series(steps_of(90), np.arange(90.0))
    short = Series(steps_of(60), np.zeros(60))
    found = difference(long, short)
    assert found is not None
    assert found.change == pytest.approx(np.arange(40, 60).mean())
    assert found.last_step == 60


def test_a_run_that_began_later_is_compared_from_there() -> None:
    whole = Series(steps_of(90), np.arange(90.0))
    late = Series(steps_of(90)[60:], np.zeros(30))
    for one, other, sign in ((whole, late, 1), (late, whole, -1)):
        found = difference(one, other)
        assert found is not None
        # The last third of steps 61 to 90, in blocks of one or two values.
        assert found.change == pytest.approx(sign * np.arange(80, 90).mean(), abs=0.5)
