"""Error bars that the log has: with them, few values tell something."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.analysis_tools import Entry
from analysis.judging_tools import bad_in, run_with_log, told_in, training
from channel_metrics.analysis.judging.means import LEVEL, Series, difference, rise_of
from channel_metrics.analysis.judging.trends import losses_of, trends_of
from channel_metrics.analysis.judging.versus import Versus

# What the normal distribution exceeds once in a hundred draws.
ONE_PERCENT = 2.326


def few(values: list[float], error: float | list[float]) -> Series:
    errors = np.broadcast_to(np.array(error, dtype=float), len(values))
    return Series(np.arange(1, len(values) + 1), np.array(values), errors=errors)


def evaluations(name: str, losses: list[float], half: float | None, first: int = 10) -> list[Entry]:
    """A log of evaluations with intervals of this half length, or with none."""
    log = []
    for place, loss in enumerate(losses):
        entry: Entry = {"step": first + 10 * place, f"eval_{name}_loss": loss}
        if half is not None:
            ends = {"low": max(0.0, loss - half), "high": loss + half}
            entry |= {f"eval_{name}_loss_{end}": value for end, value in ends.items()}
        log.append(entry)
    return log


def test_two_values_with_error_bars_can_be_told_apart() -> None:
    found = rise_of(few([2.0, 2.5], [0.03, 0.04]))
    assert found.limit == pytest.approx(ONE_PERCENT * 0.05, rel=1e-3)
    assert (found.change, found.low_step, found.level) == (0.5, 1, 2.0)


def test_each_value_may_be_the_lowest_by_chance() -> None:
    """The limit of four comparisons is exceeded once in four hundred draws."""
    found = rise_of(few([2.5, 2.0, 2.2, 2.3, 2.4], 0.1))
    assert found.limit == pytest.approx(2.807 * 0.1 * math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize("errors", [[0.1, math.nan], [math.nan, 0.1]])
def test_a_value_without_an_error_bar_tells_nothing(errors: list[float]) -> None:
    assert rise_of(few([2.0, 2.5], errors)).limit == math.inf
    assert difference(few([2.5], errors[:1]), few([2.0], errors[1:])) is None


def test_one_value_is_no_rise() -> None:
    assert rise_of(few([2.0], 0.1)).limit == math.inf


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_rate_of_false_alarms_of_few_values(count: int) -> None:
    generator = np.random.default_rng(count)
    draws = 2 + 0.1 * generator.standard_normal((4000, count))
    rises = [rise_of(few(values, 0.1)) for values in draws.tolist()]
    rate = sum(found.change > found.limit for found in rises) / len(rises)
    # Bonferroni's bound; the values share the last one, so the rate is a little smaller.
    assert 0.3 * LEVEL <= rate <= 1.4 * LEVEL


def test_two_runs_with_few_values_are_compared_by_their_last_common_ones() -> None:
    found = difference(few([3.0, 2.5, 9.0], 0.03), few([3.0, 2.0], 0.04))
    assert found is not None
    assert (found.change, found.level, found.last_step) == (0.5, 2.0, 2)
    assert found.limit == pytest.approx(ONE_PERCENT * 0.05, rel=1e-3)
    assert difference(few([3.0], 0.1), Series(np.arange(1, 3), np.ones(2))) is None, "no errors"


def test_runs_with_other_steps_are_compared_at_the_last_one_that_both_have() -> None:
    """The last values before step 9 are of steps 9 and 4: they are not compared."""
    one = Series(np.array([1, 2, 4, 9]), np.array([5, 4, 3.0, 2]), errors=np.array([1, 1, 0.03, 1]))
    other = Series(np.array([1, 4, 10]), np.array([4, 3.5, 1.9]), errors=np.array([1, 0.04, 1]))
    for found, change, level in (
        (difference(one, other), -0.5, 3.5),
        (difference(other, one), 0.5, 3.0),
    ):
        assert found is not None and found.last_step == 4
        assert (found.change, found.level) == (change, level)
        assert found.limit == pytest.approx(ONE_PERCENT * 0.05, rel=1e-3)
    assert difference(one, Series(np.array([3, 8]), np.ones(2), errors=np.ones(2))) is None


def test_the_error_is_read_off_the_upper_end_of_the_interval() -> None:
    run = run_with_log(evaluations("A", [0.05, 0.5], 0.196))
    errors = losses_of(run, "A", "eval").errors
    assert errors is not None and errors.tolist() == pytest.approx([0.1, 0.1])
    assert losses_of(run_with_log(evaluations("A", [1.0], None)), "A", "eval").errors is None


def test_an_estimate_has_no_error_bars() -> None:
    log = [{"step": s, "a_loss_estimate": 2.0, "a_loss_estimate_high": 2.1} for s in range(4)]
    run = run_with_log(log)
    assert losses_of(run, "a", "train").errors is None


def test_findings_use_error_bars() -> None:
    losses = [1.0, 1.2, 1.6]
    assert "unknown, because there are fewer than 6 values: A in eval" in told_in(
        run_with_log(evaluations("A", losses, None))
    )
    (line,) = bad_in(run_with_log(evaluations("A", losses, 0.1)))
    assert line.startswith("A in eval: worse since step 10 (+0.60 \u00b1 0.19 by its error bars)")
    text = told_in(run_with_log(evaluations("A", losses, 0.6)))
    assert "noise can explain a rise or hide one" in text
    assert "A in eval (3 values, +0.60 since step 10 \u00b1 1.1 by its error bars)" in text
    assert "by its error bars" not in told_in(run_with_log(training(36, {"a": lambda s: s / 36})))


def test_many_values_are_judged_by_their_own_noise() -> None:
    log = training(36, {"a": lambda step: 1 + step / 36})
    plain = next(t for t in trends_of(run_with_log(log)) if t.channel == "a")
    for entry in log:
        entry["a_loss_high"] = entry["a_loss"] + 5.0
        entry["a_loss_low"] = 0.0
    barred = next(t for t in trends_of(run_with_log(log)) if t.channel == "a")
    assert barred.rise == plain.rise and barred.state == "worse"


def test_runs_with_few_evaluations_are_compared_if_they_have_error_bars() -> None:
    def compared(half: float | None) -> str:
        first, second = (run_with_log(evaluations("A", [2.0, last], half)) for last in (1.0, 1.3))
        return told_in(first, second)

    assert "A in eval: worse than in the first run (run) by 30.0%, between" in compared(0.1)
    assert "A in eval (+30.0% \u00b1 " in compared(0.5)
    assert "A in eval (too few values)" in compared(None)


def test_no_difference_has_no_minus() -> None:
    found = Versus(channel="a", split="train", change=-0.0004, limit=0.016, last_step=9)
    assert found.interval == "+0.0% \u00b1 1.6%"
