"""What a chart stands over, what it marks, the mix so far, and series without a chart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.analysis_tools import make_history, run_of, series_of, write_jsonl
from analysis.report_page import channels_of
from analysis.report_runs import resumed_run, rich_run, run_with
from channel_metrics.analysis.report.axes import axes_of, marks_of
from channel_metrics.analysis.report.curves import curves_of
from channel_metrics.analysis.report.more_curves import mix_curves, other_curves, overwritten_curves
from channel_metrics.analysis.report.page_data import page_data
from channel_metrics.analysis.report.views import shown
from channel_metrics.analysis.run import RUN_FILE, load_run


def test_axes_are_those_of_the_log() -> None:
    run = run_of(make_history(40))
    assert set(axes_of(run)) == {"all_tokens"}
    steps, values = axes_of(run)["all_tokens"]
    tokens = [series_of(run, name, "tokens") for name in run.channels("train")]
    sums = np.cumsum([sum(series.get(step, 0) for series in tokens) for step in range(1, 41)])
    assert (steps.tolist(), values.tolist()) == (list(range(1, 41)), sums.tolist())
    assert set(axes_of(rich_run())) == {"all_tokens", "epoch", "time"}


def test_an_axis_never_goes_back_and_is_short() -> None:
    # The clock of a resumed job begins anew.
    clock = [*range(1000), *range(500)]
    entries = [{"step": s, "loss": 1.0, "_runtime": t} for s, t in enumerate(clock)]
    steps, values = axes_of(run_of(entries))["time"]
    assert len(steps) == 300 and (steps[0], steps[-1]) == (0, 1499)
    assert (np.diff(values) >= 0).all() and values[-1] == 999


def test_marks() -> None:
    marks = marks_of(rich_run())
    assert marks[0] == {"kind": "alert", "step": 50, "text": "alert_rising"}
    assert [mark["step"] for mark in marks[1:]] == [40, 80, 120, 160]
    resumed = [mark for mark in marks_of(resumed_run()) if mark["kind"] == "resume"]
    assert resumed == [{"kind": "resume", "step": s, "text": "resumed"} for s in (21, 36)]


def test_what_a_resume_overwrote_is_a_curve_of_its_own() -> None:
    run = resumed_run()
    curves = {(c.channel, c.metric): c for c in overwritten_curves(run, ["bbu"], 100)}
    loss = curves["bbu", "loss"]
    first, second = (
        series_of(run_of(make_history(last, seed=seed)), "bbu", "loss")
        for seed, last in enumerate((30, 38))
    )
    # The line is broken between the two branches.
    assert loss.steps.tolist() == [*range(21, 31), 36, 36, 37, 38]
    assert np.isnan(loss.values).tolist() == [False] * 10 + [True] + [False] * 3
    assert loss.values[~np.isnan(loss.values)].tolist() == [
        *(first[step] for step in range(21, 31)),
        *(second[step] for step in range(36, 39)),
    ]
    data = page_data([replace(channels_of(run), names=["bbu"])], 100)
    marked = [c for c in data["curves"] if c.get("overwritten")]
    assert {(c["channel"], c["metric"]) for c in marked} == {
        (number, metric)
        for number in (-1, 0)
        for metric in ("loss", "token_acc", "share")
        if metric == "loss" or number == 0
    }
    assert not list(overwritten_curves(rich_run(), ["a"], 100))


def test_a_resume_from_before_an_earlier_one_breaks_the_overwritten_line_there() -> None:
    run = resumed_run(((1, 40), (36, 45), (21, 60)))
    assert run.resumes == (36, 21)
    loss = next(c for c in overwritten_curves(run, ["bbu"], 100) if c.channel == "bbu")
    # Up to step 35 they are values of the first branch, from 36 on of the second one.
    assert loss.steps.tolist() == [*range(21, 36), 36, *range(36, 46)]
    assert np.isnan(loss.values).nonzero()[0].tolist() == [15]


def test_the_mix_so_far_counts_windows_without_a_channel() -> None:
    history = [{"step": s, "a_loss": 1, "a_tokens": 5, "a_samples": 3} for s in (1, 2, 3)]
    history[1] |= {"b_loss": 1, "b_tokens": 5, "b_samples": 1}
    curves = {curve.channel: curve for curve in mix_curves(run_of(history), ["a", "b"], 100)}
    assert curves["a"].values.tolist() == [1, 6 / 7, 9 / 10]
    assert curves["b"].values.tolist() == [0, 1 / 7, 1 / 10]


def test_the_mix_of_a_resumed_run_goes_on_from_its_totals(tmp_path: Path) -> None:
    """The log of the second job begins at step 11; a had 90 records by then, and b 10."""
    names = {"a": (90, 1), "b": (10, 9)}
    log = [
        {"step": 10 + i, "a_loss": 1.0, "a_tokens": 1}
        | {f"{name}_samples": each for name, (_, each) in names.items()}
        | {f"{name}_samples_total": before + each * i for name, (before, each) in names.items()}
        for i in range(1, 6)
    ]
    write_jsonl(tmp_path / "logging.jsonl", log)
    (tmp_path / RUN_FILE).write_text(json.dumps({"ratios": {"a": 1, "b": 1}, "records": {"a": 50}}))
    curves = list(mix_curves(load_run(tmp_path), ["a", "b"], 100))
    found = {(curve.channel, curve.metric): curve.values.tolist() for curve in curves}
    steps = range(1, 6)
    assert found["a", "mix"] == pytest.approx([(90 + i) / (100 + 10 * i) for i in steps])
    assert found["a", "epochs"] == pytest.approx([(90 + i) / 50 for i in steps])
    assert ("b", "epochs") not in found


def test_epochs_over_each_source_need_its_size(tmp_path: Path) -> None:
    history = [{"step": s, "a_loss": 1, "a_tokens": 5, "a_samples": 3} for s in (1, 2, 3)]
    log = write_jsonl(tmp_path / "logging.jsonl", history)
    assert {c.metric for c in mix_curves(load_run(tmp_path), ["a"], 100)} == {"mix"}
    (tmp_path / RUN_FILE).write_text(json.dumps({"ratios": {"a": 1}, "records": {"a": 6}}))
    for path in (tmp_path, log):
        _, epochs = mix_curves(load_run(path), ["a"], 100)
        assert (epochs.metric, epochs.values.tolist()) == ("epochs", [0.5, 1.0, 1.5])


def test_other_series_are_whole_metrics() -> None:
    curves = list(other_curves(rich_run(), ["a", "b"], 100))
    names = {(curve.channel, curve.metric) for curve in curves}
    assert {("", "grad_norm"), ("", "learning_rate"), ("a", "tokens"), ("b", "samples")} <= names
    assert not {metric for _, metric in names} & {"loss", "loss_low", "loss_high", "share"}
    assert max(len(curve.steps) for curve in curves) <= 50
    # Of 250 channels, one metric has room, and a second would not be complete.
    many = [f"c{i}" for i in range(250)]
    found = [curve.metric for curve in other_curves(run_with(many, steps=4), many, 100)]
    assert sorted(set(found)) == ["tokens"] and len(found) == 250


def test_each_strength_is_one_curve_more() -> None:
    run = run_of(make_history(600))
    curves = [c for c in curves_of(run, ["bbu"], 2000, (1, 2, 3)) if c.split == "train"]
    of_loss = [c for c in curves if (c.channel, c.metric) == ("bbu", "loss")]
    assert [curve.smooth for curve in of_loss] == [0, 1, 2, 3]

    def roughness(values: Any) -> float:
        return float(np.abs(np.diff(values, n=2)).mean())

    rough = [roughness(np.interp(range(1, 601), c.steps, c.values)) for c in of_loss]
    assert rough == sorted(rough, reverse=True)


def test_the_page_has_tokens_once_for_each_channel() -> None:
    run = run_of(make_history(200))
    data = page_data([channels_of(run)], 2000)
    with_tokens = [(c["channel"], c["metric"]) for c in data["curves"] if "tokens" in c]
    assert sorted(with_tokens) == [(0, "loss"), (1, "loss"), (2, "loss")]


def test_a_name_of_blanks_is_shown_as_such() -> None:
    assert [shown(name) for name in ("", " ", "  \u00a0", "a b")] == [
        "(no name)",
        "(1 blank)",
        "(3 blanks)",
        "a b",
    ]


def test_a_clock_that_stands_still_is_no_error() -> None:
    run = replace(run_of([{"step": s, "loss": 1.0, "_runtime": 5} for s in (1, 2)]), name="x")
    assert axes_of(run)["time"][1].tolist() == [0, 0]
