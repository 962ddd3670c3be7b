"""What findings say beside the verdict: what is expected by chance, what is at its lowest."""

from __future__ import annotations

import math

import pytest

from analysis.analysis_tools import Entry
from analysis.judging_tools import bad_in, evaluated, found_in, run_with_log, told_in, training
from channel_metrics.analysis.run import Run


def test_many_losses_are_told_how_many_look_worse_by_chance() -> None:
    def rising(count: int) -> str:
        losses = {f"c{i}": lambda s: 1.0 for i in range(count - 1)}
        return told_in(run_with_log(training(36, losses | {"up": lambda s: 1 + s / 36})))

    # Each channel, and the whole run.
    assert "? of 100 losses, noise alone makes about 1 look worse" in rising(99)
    assert "noise alone makes" not in rising(98)
    many = rising(149).splitlines()
    place = next(i for i, line in enumerate(many) if line.startswith("! up: worse since step"))
    chance = "? of 150 losses, noise alone makes about 2 look worse"
    assert chance in many[place:]


def test_nothing_is_said_of_chance_where_nothing_is_worse() -> None:
    run = run_with_log(training(36, {f"c{i}": lambda s: 3 - s / 18 for i in range(120)}))
    assert [finding.word for finding in found_in(run)].count("chance") == 0


def test_chance_is_told_of_runs_that_are_compared() -> None:
    names = [f"c{i}" for i in range(120)]

    def run(more: float) -> Run:
        losses = {name: lambda s: 3 - s / 18 for name in names}
        return run_with_log(training(36, losses | {"c7": lambda s: 3 - s / 18 + more}))

    text = told_in(run(0.0), run(1.0))
    assert "! c7: worse than in the first run" in text
    assert "? of 121 losses, noise alone makes about 1 look worse" in text


def test_the_last_value_of_a_few_is_the_lowest() -> None:
    text = told_in(run_with_log(evaluated(10, {"A": [3.0, 2.0], "B": [2.0, 3.0]})))
    assert "A in eval (2 values, now at its lowest)" in text
    assert "B in eval (2 values, +1.00 since step 10)" in text


def test_a_run_that_is_half_a_percent_worse_is_told_to_be_equal() -> None:
    """Without noise any difference is certain, but another seed brings one of a percent."""

    def told(factor: float) -> str:
        logs = ([{"step": s, "loss": f * (3 - s / 18)} for s in range(1, 37)] for f in (1, factor))
        return told_in(*map(run_with_log, logs))

    assert "not worse than in run, because a rise by a twentieth is ruled out" in told(1.005)
    assert "the whole run: worse than in the first run (run) by 2.0%" in told(1.02)


def test_a_loss_that_became_nan_twice_is_lost_since_the_second_time() -> None:
    log = training(20, {"a": lambda s: math.nan if s == 5 or s > 10 else 1.0})
    (lost,) = (found for found in found_in(run_with_log(log)) if found.channel == "a")
    assert lost.text.startswith("NaN since step 11; the last number was")
    assert lost.text.endswith("at step 10")


@pytest.mark.parametrize("other", [1.0, -1.0])
def test_the_whole_run_is_told_what_its_channels_are(other: float) -> None:
    """A gets few tokens after step 120; B falls in evaluation, or rises though it is trained on."""
    log = training(240, {"A": lambda s: 3 - s / 120, "B": lambda s: 3 - s / 120})
    for entry in log:
        entry["A_tokens"] = 100 if entry["step"] <= 120 else 5
        if (step := entry["step"]) % 10 == 0:
            entry |= {
                "eval_A_loss": 2 + abs(step - 120) / 60,
                "eval_loss": 2 + abs(step - 120) / 90,
            }
            entry["eval_B_loss"] = 3 - step / 240 if other > 0 else entry["eval_loss"]
    (line,) = (t for t in bad_in(run_with_log(log)) if t.startswith("the whole run in eval: worse"))
    assert line.endswith(": forgetting of A" if other > 0 else ": overfitting")


@pytest.mark.parametrize("first", [0.0, 2.0])
def test_a_loss_of_exactly_zero_is_no_comfort(first: float) -> None:
    log: list[Entry] = [{"step": s, "loss": first if s <= 20 else 0.0} for s in range(1, 121)]
    text = told_in(run_with_log(log))
    zeros = 100 if first else 120
    assert f"nothing was counted: the whole run (0 in the last {zeros} values)" in text
    assert "not worse" not in text
    few: list[Entry] = [{"step": s, "loss": max(0.0, 15 - s)} for s in range(1, 20)]
    assert "not worse" in told_in(run_with_log(few)), "5 zeros"


@pytest.mark.parametrize(("later", "is_forgotten"), [(30, False), (20, True)])
def test_forgetting_is_less_than_half_of_the_former_share(later: int, is_forgotten: bool) -> None:
    log: list[Entry] = []
    for step in range(1, 241):
        tokens = 50 if step <= 120 else later
        entry: Entry = {"step": step, "A_loss": 1.0, "B_loss": 1.0, "loss": 1.0}
        log.append(entry | {"A_tokens": tokens, "B_tokens": 100 - tokens})
        if step % 10 == 0:
            log.append({"step": step, "eval_A_loss": 1 + abs(step - 120) / 120})
    (line,) = (line for line in bad_in(run_with_log(log)) if line.startswith("A in eval: worse"))
    assert line.endswith(": forgetting") == is_forgotten
    assert (f"{later}.0% of the training since then, and 50.0% before" in line) == is_forgotten
