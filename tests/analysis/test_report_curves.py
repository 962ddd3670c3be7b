"""What is drawn: few points that keep the shape, moving means of sums, nothing across a gap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.analysis_tools import make_history, run_of, series_of
from analysis.report_runs import run_with, troubled_run
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.curves import Curve, curves_of, own_tokens, pick_points
from channel_metrics.analysis.report.findings import find_gaps
from channel_metrics.analysis.report.moving import MovingMeans
from channel_metrics.analysis.rows import total_of
from channel_metrics.analysis.run import Run

VALUES = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=400)


def curve_of(run: Run, channel: str, metric: str, limit: int = 2000, **wanted: object) -> Curve:
    found = [
        curve
        for curve in curves_of(run, run.channels(), limit)
        if (curve.channel, curve.metric) == (channel, metric)
        and all(getattr(curve, name) == value for name, value in wanted.items())
    ]
    assert len(found) == 1
    return found[0]


@given(VALUES, st.integers(5, 60))
def test_points_that_are_kept(values: list[float], limit: int) -> None:
    array = np.array(values, dtype=float)
    picked = pick_points(array, limit).tolist()
    assert picked == sorted(set(picked))
    if len(values) <= limit:
        assert picked == list(range(len(values)))
        return
    assert len(picked) <= limit
    assert picked[0] == 0 and picked[-1] == len(values) - 1
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        kept = [values[i] for i in picked]
        assert min(finite) in kept and max(finite) in kept
    else:
        assert all(not math.isfinite(values[i]) for i in picked)


def test_a_spike_and_a_nan_of_one_point_in_a_million_are_kept() -> None:
    values = np.zeros(1_000_000)
    values[123_456], values[654_321], values[777_777] = 9.0, -9.0, np.nan
    picked = set(pick_points(values, 300).tolist())
    assert {0, 123_456, 654_321, 777_777, 999_999} <= picked
    assert len(picked) <= 300


def test_a_curve_with_a_nan_in_every_stretch_has_no_more_points_than_wanted() -> None:
    values = np.tile([0.0, 1.0, math.nan, 0.5], 1000)
    assert 60 < len(pick_points(values, 100)) <= 100


def test_short_curves_are_the_log() -> None:
    run = run_of(make_history(40))
    for metric in ("loss", "token_acc", "share"):
        for channel in run.channels():
            curve = curve_of(run, channel, metric, split="train")
            expected = series_of(run, channel, metric)
            assert dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) == expected
            assert curve.num_points == len(expected)
            assert not curve.is_smooth


def test_own_tokens_are_those_up_to_each_step() -> None:
    run = run_of(make_history(30))
    tokens = series_of(run, "rru", "tokens")
    steps = np.array([0, 1, 7, 7, 30, 99])
    expected = [sum(n for at, n in tokens.items() if at <= step) for step in steps.tolist()]
    found = own_tokens(run, "rru", steps)
    assert found is not None and found.tolist() == expected


def test_own_tokens_go_on_where_a_resumed_run_did() -> None:
    history = [{"step": 5, "a_loss": 1.0, "a_tokens": 10, "a_tokens_total": 110}]
    history += [{"step": 6, "a_loss": 1.0, "a_tokens": 10, "a_tokens_total": 120}]
    found = own_tokens(run_of(history), "a", np.array([4, 5, 6]))
    assert found is not None and found.tolist() == [0, 110, 120]


def test_tokens_after_the_last_total_are_added_to_it() -> None:
    """A log of an older version goes on with totals; a newer one stops logging them."""
    windows = {1: 10, 2: 20, 3: 30, 4: 40, 6: 60}
    history: list[dict[str, float]] = [{"step": s, "a_tokens": t} for s, t in windows.items()]
    history[2]["a_tokens_total"] = 1000
    run = run_of(history, channels=["a"])
    found = own_tokens(run, "a", np.arange(8))
    assert found is not None
    assert found.tolist() == [0, 10, 30, 1000, 1040, 1040, 1100, 1100]
    assert total_of(run, "a", "tokens") == 1100
    assert own_tokens(run, "b", np.arange(8)) is None and total_of(run, "b", "tokens") is None


def test_without_counts_there_are_no_own_tokens() -> None:
    run = run_of([{"step": 1, "loss_a": 1.0}, {"step": 2, "loss_a": 0.5}])
    assert own_tokens(run, "a", np.array([1])) is None
    assert curve_of(run, "a", "loss").tokens is None


def naive_means(
    steps: Sequence[int], part: dict[int, float], whole: dict[int, float]
) -> dict[int, float]:
    """Σ part / Σ whole over a fortieth of the steps around each, by a double loop."""
    half = (steps[-1] - steps[0]) / 80
    means = {}
    for step in steps:
        window = [s for s in steps if abs(s - step) <= half]
        weight = sum(whole[s] for s in window)
        means[step] = sum(part[s] for s in window) / weight if weight else math.nan
    return means


@pytest.mark.parametrize("metric", ["loss", "token_acc"])
def test_smooth_curves_are_ratios_of_sums(metric: str) -> None:
    run = run_of(make_history(400, seed=3))
    tokens, values = series_of(run, "lvis", "tokens"), series_of(run, "lvis", metric)
    part = {step: value * tokens[step] for step, value in values.items()}
    expected = naive_means(list(values), part, {step: tokens[step] for step in values})
    steps, means = MovingMeans(run, find_gaps(run)).of("lvis", metric)
    assert len(steps) == 200
    for step, mean in zip(steps.tolist(), means.tolist(), strict=True):
        assert mean == pytest.approx(expected[step], rel=1e-12)


def test_the_smooth_share_counts_windows_without_the_channel() -> None:
    history = make_history(200, seed=5)
    for entry in history:
        if "lvis_tokens" in entry and entry["step"] % 3:
            for metric in ("loss", "token_acc", "tokens", "share"):
                del entry[f"lvis_{metric}"]
    run = run_of(history)
    tokens = {name: series_of(run, name, "tokens") for name in run.channels("train")}
    whole = {s: sum(t.get(s, 0.0) for t in tokens.values()) for s in range(1, 201)}
    part = {step: tokens["lvis"].get(step, 0.0) for step in whole}
    expected = naive_means(list(whole), part, whole)
    steps, means = MovingMeans(run, find_gaps(run)).of("lvis", "share")
    for step, mean in zip(steps.tolist(), means.tolist(), strict=True):
        assert mean == pytest.approx(expected[step], rel=1e-12)


def test_the_smooth_loss_of_the_run_is_weighted_by_the_tokens_of_all() -> None:
    run = run_with(["a", "b"], steps=160)
    tokens = [series_of(run, name, "tokens") for name in ("a", "b")]
    whole = {step: tokens[0][step] + tokens[1][step] for step in tokens[0]}
    losses = series_of(run, GLOBAL, "loss")
    part = {step: losses[step] * whole[step] for step in whole}
    expected = naive_means(list(whole), part, whole)
    steps, means = MovingMeans(run, find_gaps(run)).of(GLOBAL, "loss")
    assert means.tolist() == pytest.approx([expected[step] for step in steps.tolist()], rel=1e-12)


def test_smooth_curves_stop_at_a_gap() -> None:
    history = [
        {"step": step, "a_loss": 3 - step / 400, "a_tokens": 7, "a_share": 0.5}
        | {"b_loss": 2.0, "b_tokens": 7}
        for step in range(1, 1001)
    ]
    for entry in history[400:599]:
        del entry["a_loss"], entry["a_tokens"], entry["a_share"]
    run = run_of(history)
    for metric in ("loss", "share"):
        smooth = curve_of(run, "a", metric, is_smooth=True)
        for step, mean in zip(smooth.steps.tolist(), smooth.values.tolist(), strict=True):
            if math.isnan(mean):
                continue
            side = range(1, 401) if step <= 400 else range(600, 1001)
            near = [s for s in side if abs(s - step) <= 999 / 80]
            if metric == "loss":
                own = [3 - s / 400 for s in near]
                assert mean == pytest.approx(sum(own) / len(own), rel=1e-12)
            else:
                assert mean == (0.0 if 400 < step < 600 else 0.5)
        assert smooth.steps[smooth.steps <= 400][-1] > 390


def test_the_window_of_a_smooth_curve_is_over_steps() -> None:
    # Logged every step, then every tenth.
    steps = [*range(1, 201), *range(210, 2001, 10)]
    history = [{"step": step, "a_loss": step % 7, "a_tokens": 1 + step % 3} for step in steps]
    part = {step: float(step % 7) * (1 + step % 3) for step in steps}
    expected = naive_means(steps, part, {step: 1.0 + step % 3 for step in steps})
    run = run_of(history)
    found, means = MovingMeans(run, find_gaps(run)).of("a", "loss")
    assert means.tolist() == pytest.approx([expected[step] for step in found.tolist()], rel=1e-12)


def test_one_nan_takes_no_part_in_a_smooth_curve_and_breaks_the_other() -> None:
    history = make_history(150)
    entry = next(e for e in history if e["step"] == 75)
    entry["bbu_loss"] = math.nan
    curves = [c for c in curves_of(run_of(history), ["bbu"], 2000) if c.split == "train"]
    raw, smooth = (c for c in curves if (c.channel, c.metric) == ("bbu", "loss"))
    assert np.isnan(raw.values).sum() == 1
    assert np.isfinite(smooth.values).all()


def test_a_smooth_curve_ends_where_its_values_become_nan() -> None:
    """The windows of the next steps still reach values from before."""
    history: list[dict[str, float]] = [
        {"step": s, "loss": 1.0, "web_loss": 2.0 if s <= 100 else math.nan, "web_tokens": 9}
        for s in range(1, 201)
    ]
    curves = curves_of(run_of(history), ["web"], 1000, [1, 2, 3])
    smooth = [c for c in curves if c.is_smooth and c.channel == "web" and c.metric == "loss"]
    # The strongest one has fewer points.
    assert [c.steps[np.isfinite(c.values)].max() for c in smooth] == [100, 100, 99]


def test_nothing_is_drawn_across_a_gap() -> None:
    run = troubled_run()
    curve = curve_of(run, "starved", "loss")
    (broken,) = np.isnan(curve.values).nonzero()[0]
    assert curve.steps[broken - 1] == 18 and curve.steps[broken + 1] == 39
    assert curve.tokens is not None and len(curve.tokens) == len(curve.steps)
    assert not np.isnan(curve_of(run, "fine", "loss").values).any()


def test_a_band_goes_with_its_points() -> None:
    history = [
        {"step": s, "a_loss_estimate": 2.0, "a_loss_estimate_low": 2 - s, "a_samples": 1}
        | {"a_loss_estimate_high": 2.0 + s}
        for s in range(1, 30)
    ]
    curve = curve_of(run_of(history, channels=["a"]), "a", "loss", 12)
    assert curve.is_estimate and curve.band is not None
    assert len(curve.steps) <= 12
    assert curve.band[0].tolist() == [2 - step for step in curve.steps.tolist()]
    assert curve.band[1].tolist() == [2 + step for step in curve.steps.tolist()]


def test_the_mix_of_an_evaluation_is_no_curve() -> None:
    history = [{"step": s, "eval_a_loss": 1.0, "eval_a_share": 1.0} for s in (1, 2)]
    assert [c.metric for c in curves_of(run_of(history), ["a"], 100)] == ["loss"]


def test_a_gap_at_an_end_of_the_run_breaks_nothing() -> None:
    history: list[dict[str, float]] = [
        {"step": s, "a_loss": 1.0, "a_tokens": 5.0} for s in range(60)
    ]
    for entry in history[20:40]:
        entry |= {"b_loss": 1.0, "b_tokens": 5.0}
    run = run_of(history)
    assert len(find_gaps(run)) == 2
    curve = curve_of(run, "b", "loss")
    assert curve.steps.tolist() == list(range(20, 40)) and np.isfinite(curve.values).all()
