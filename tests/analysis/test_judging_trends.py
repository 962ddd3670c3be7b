"""Losses that get worse, in logs in the form of real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from paths import ROOT

from analysis.analysis_tools import run_of
from analysis.judging_tools import (
    bad_in,
    evaluated,
    found_in,
    playbook,
    run_with_log,
    told_in,
    training,
)
from analysis.report_runs import troubled_run
from channel_metrics.analysis.judging.trends import Trend, trends_of
from channel_metrics.analysis.run import Run, load_run

SIX = {"A": 1.4, "B": 2.75, "C": 1.3, "D": 1.9, "E": 1.6, "F": 1.2}


def trend_of(run: Run, channel: str, split: str = "train") -> Trend:
    (trend,) = (t for t in trends_of(run) if (t.channel, t.split) == (channel, split))
    return trend


def states(run: Run) -> dict[tuple[str, str], str]:
    return {(trend.channel, trend.split): trend.state for trend in trends_of(run)}


def whole_run(steps: int, first: float, last: float) -> list[dict[str, float]]:
    """A log with nothing but the loss of the whole run, which falls."""
    place = math.log(first / last)
    return [{"step": s, "loss": first * math.exp(-place * s / steps)} for s in range(1, steps + 1)]


def test_six_evaluation_sets_rise_while_training_falls() -> None:
    rises = {n: [1.1 + (end - 1.1) * place / 7 for place in range(8)] for n, end in SIX.items()}
    run = run_with_log(whole_run(800, 1.1, 0.06), evaluated(100, rises))
    assert states(run) == {("", "train"): "steady"} | {(name, "eval"): "worse" for name in SIX}
    lines = bad_in(run)
    assert lines[0].startswith(
        "B in eval: worse since step 100 (+1.65), from 1.1000 to 2.7500, while the training"
    )
    assert len(lines) == 6 and all(line.endswith(": overfitting") for line in lines)


def test_overfitting_in_the_file_of_a_trainer(tmp_path: Path) -> None:
    history = whole_run(800, 1.1, 0.06)
    for number, loss in enumerate([1.1, 1.2, 1.4, 1.7, 2.0, 2.3, 2.5, 2.75], 1):
        log = {"eval_B_loss": loss, "eval_B_runtime": 1.5, "eval_B_samples_per_second": 70.0}
        history.append(log | {"epoch": number, "step": 100 * number})
    state = {"global_step": 800, "log_history": [entry | {"epoch": 1.0} for entry in history]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (line,) = bad_in(load_run(tmp_path))
    assert line.startswith("B in eval: worse since step 100 (+1.65), from 1.1000 to 2.7500")


def test_an_evaluation_rises_in_eight_evaluations() -> None:
    losses = [0.96, 0.97, 1.0, 1.03, 1.08, 1.12, 1.17, 1.21]
    better = [0.9, 0.88, 0.86, 0.85, 0.83, 0.83, 0.82, 0.81]
    run = run_with_log(whole_run(800, 1.1, 0.6), evaluated(100, {"A": better, "B": losses}))
    rise = trend_of(run, "B", "eval").rise
    assert (rise.low, rise.last, rise.low_step) == (0.96, 1.21, 100)
    (line,) = bad_in(run)
    assert line.startswith("B in eval: worse since step 100 (+0.25), from 0.9600 to 1.2100")
    assert trend_of(run, "A", "eval").state == "steady"


def test_an_evaluation_that_falls_and_then_rises() -> None:
    losses = [2.0, 1.5, 1.2, 1.1, 1.15, 1.3, 1.6, 2.0]
    run = run_with_log(whole_run(800, 1.1, 0.06), evaluated(100, {"B": losses}))
    assert bad_in(run)[0].startswith(
        "B in eval: worse since step 400 (+0.90), from 1.1000 to 2.0000"
    )


def test_a_channel_that_drags_the_whole_run_up_is_found() -> None:
    run = run_with_log(
        training(300, {"A": lambda s: 2 - s / 300, "B": lambda s: 0.8 + 3 * max(0, s - 60) / 240})
    )
    assert {name: trend_of(run, name).state for name in ("A", "B", "")} == {
        "A": "steady",
        "B": "worse",
        "": "worse",
    }
    rise = trend_of(run, "B").rise
    assert rise.low == pytest.approx(0.8, abs=0.03) and rise.low_step <= 60
    # The mean of the last 16 steps, of which the last has 3.8.
    assert rise.last == pytest.approx(3.8 - 7.5 * 3 / 240, abs=0.03)
    first, second = bad_in(run)[:2]
    assert first.startswith("B: worse since step") and "the loss of the whole run rose by" in first
    assert second.startswith("the whole run: worse since step")


def test_a_jump_at_the_end_is_found() -> None:
    run = run_with_log(training(200, {"A": lambda s: 1.0, "B": lambda s: 0.8 if s < 170 else 3.8}))
    assert trend_of(run, "B").state == "worse"
    assert trend_of(run, "B").rise.last == pytest.approx(3.8, abs=0.03)


def test_losses_below_zero_are_judged_alike() -> None:
    run = run_with_log(
        training(200, {"A": lambda s: -1 - s / 200, "B": lambda s: -2 + s / 200, "C": lambda s: -1})
    )
    assert [trend_of(run, name).state for name in "ABC"] == ["steady", "worse", "steady"]


def test_one_spike_is_no_rise() -> None:
    history = training(200, {"A": lambda s: 1.0})
    history[190]["A_loss"] = 9.0
    assert trend_of(run_with_log(history), "A").state != "worse"


@pytest.mark.parametrize("rising", [False, True])
def test_a_log_without_channels_is_judged_as_a_whole(rising: bool) -> None:
    history = training(200, {"x": lambda s: 2 + s / 200 if rising else 2 - s / 200})
    run = run_with_log([{"step": e["step"], "loss": e["loss"]} for e in history])
    assert states(run) == {("", "train"): "worse" if rising else "steady"}
    assert "unknown which channel, because the log names none" in told_in(run)
    assert "no channel is missing" not in told_in(run)


def test_few_values_are_unknown_and_never_fine() -> None:
    run = run_with_log(
        [{"step": s, "loss": 2.0, "A_loss": float(s)} for s in range(1, 4)],
        evaluated(1, {"A": [1.0, 0.9]}),
    )
    assert set(states(run).values()) == {"few"}
    text = told_in(run)
    assert "unknown, because there are fewer than 6 values: " in text
    assert "A (3 values, +2.00 since step 1), A in eval (2 values" in text
    assert all(finding.level == "unknown" for finding in found_in(run))


def test_noise_that_could_hide_a_rise_is_unknown() -> None:
    losses = [1.0, 1.3, 0.9, 1.2, 0.95, 1.3, 0.9, 1.25]
    run = run_with_log(whole_run(800, 1.1, 0.6), evaluated(100, {"A": losses}))
    assert trend_of(run, "A", "eval").state == "noisy"
    assert "unknown, because noise can explain a rise or hide one" in told_in(run)


def test_estimates_are_not_judged() -> None:
    history = [{"step": s, "a_loss_estimate": 1 + s / 9, "a_samples": 1.0} for s in range(1, 30)]
    run = run_with_log(history, channels=["a"])
    assert trend_of(run, "a").state == "estimated"
    assert "because the losses are estimates: a" in told_in(run)


def test_a_channel_that_turns_up_while_the_whole_run_falls() -> None:
    (line, *_) = bad_in(troubled_run())
    assert line.startswith(
        "worse: worse since step 30 (+1.43), from 0.5340 to 1.9593, while the loss"
    )
    assert "of the whole run fell by" in line


def test_the_whole_run_excuses_no_channel() -> None:
    history = training(200, {"A": lambda s: 1 + s / 200})
    alone = run_with_log([{k: v for k, v in e.items() if k != "loss"} for e in history])
    both = run_with_log([e | {"loss": 1 + e["step"] / 100} for e in history])
    assert trend_of(alone, "A").state == trend_of(both, "A").state == "worse"


# What docs/TRAINING_PLAYBOOK.md says about these runs.
def test_the_healthy_run_of_the_playbook() -> None:
    run = playbook("healthy")
    assert bad_in(run) == []
    assert set(states(run).values()) == {"steady"}


def test_forgetting_in_the_playbook() -> None:
    lines = bad_in(playbook("forgetting"))
    for name, since in (("lvis", "+0.82"), ("lang_chat", "+0.88"), ("rru", "+0.61")):
        (line,) = (text for text in lines if text.startswith(f"{name} in eval: "))
        assert f"worse since step 60 ({since})" in line and line.endswith(" before: forgetting")
    assert trend_of(playbook("forgetting"), "bbu", "eval").state == "steady"


def test_the_whole_run_does_not_overfit_where_its_channels_are_forgotten() -> None:
    (line,) = (text for text in bad_in(playbook("forgetting")) if text.startswith("the whole run"))
    assert line == (
        "the whole run in eval: forgetting of lang_chat, lvis, rru: no lower than 2.5962 at step "
        "60, while its ratio to the training loss more than doubled"
    )


def test_the_lines_in_the_docs_are_those_of_the_forgetting_run() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    (block,) = (part for part in page.split("```") if part.startswith("text\n! "))
    lines = block.removeprefix("text\n").splitlines()
    assert len(lines) > 3 and set(lines) <= set(told_in(playbook("forgetting")).splitlines())


def test_imbalance_in_the_playbook() -> None:
    run = playbook("imbalance")
    (line,) = bad_in(run)
    assert line.startswith("lang_chat: worse since step 25 (+0.55)")
    assert "lang_chat in eval (+0.48 since step 60" in told_in(run)


def test_a_broken_source_in_the_playbook() -> None:
    run = playbook("broken")
    assert bad_in(run) == []
    assert "rru in eval (+0.17 since step 40" in told_in(run)


def test_overfitting_in_the_playbook() -> None:
    (line,) = bad_in(playbook("overfitting"))
    assert line.startswith("bbu in eval: overfitting: no lower than 0.1542 at step 160, while")
    assert line.endswith("its ratio to the training loss more than doubled")


def test_a_loss_that_came_back_to_its_lowest_is_not_worse() -> None:
    losses = [1.0] * 24 + [1.5] * 10 + [1.0] * 2
    (trend,) = trends_of(run_of([{"step": s, "loss": v} for s, v in enumerate(losses, 1)]))
    assert trend.rise.change > trend.rise.limit
    assert trend.state == "steady"


@pytest.mark.parametrize(("fall", "state"), [(1.8, "steady"), (2.3, "overfitting")])
def test_overfitting_needs_twice_the_ratio(fall: float, state: str) -> None:
    """Training is a mean since the last evaluation, so the ratio changes in healthy runs, too."""
    log: list[dict[str, float]] = []
    for step in range(1, 241):
        part = min(max((step - 80) / 80, 0), 1)
        log.append({"step": step, "loss": fall**-part})
        if step % 20 == 0:
            # The lowest one is the second.
            log.append({"step": step, "eval_loss": 1.0 - 0.001 * (step == 40)})
    (evaluation,) = (t for t in trends_of(run_of(log)) if t.split == "eval")
    assert evaluation.state == state


def test_the_training_loss_at_a_step_is_a_mean_around_it() -> None:
    """A spike at the step of the lowest evaluation says little: nine steps on each side count."""
    log: list[dict[str, float]] = []
    for step in range(1, 181):
        log.append({"step": step, "loss": 20.0 if step == 40 else 2.0 if step <= 90 else 1.0})
        if step % 20 == 0:
            log.append({"step": step, "eval_loss": 1.0 - 0.001 * (step == 40)})
    (evaluation,) = (t for t in trends_of(run_of(log)) if t.split == "eval")
    assert evaluation.training == pytest.approx(1 - (18 * 2 + 20) / 19)


def test_an_evaluation_that_falls_does_not_overfit() -> None:
    """Training falls much faster, and the last evaluation is not the lowest."""
    log: list[dict[str, float]] = []
    for step in range(1, 241):
        log.append({"step": step, "loss": 10 ** (-step / 120)})
        if step % 20 == 0:
            log.append(
                {"step": step, "eval_loss": 1 - min(step, 220) / 500 + 0.001 * (step == 240)}
            )
    (evaluation,) = (t for t in trends_of(run_of(log)) if t.split == "eval")
    assert evaluation.rise.low_step == 220
    assert evaluation.rise.change < -evaluation.rise.limit
    assert evaluation.state == "steady"
