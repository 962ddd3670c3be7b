"""Estimated channel losses against curves that are known, and against measured ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.analysis_tools import run_of, series_of
from benchmarks.estimate import compare, hide
from channel_metrics import ChannelMetricsError
from channel_metrics.analysis.estimate import estimator
from channel_metrics.analysis.estimate.estimator import Estimate, estimate_curves
from channel_metrics.analysis.estimate.mix import with_estimates
from channel_metrics.analysis.estimate.smoother import Fit
from channel_metrics.analysis.readers.keys import GLOBAL

NAMES = ("bbu", "rru", "lvis", "chat")
Floats = NDArray[np.float64]


def curves(time: Floats, channels: int = 4) -> Floats:
    """Fast and slow ones, and one that gets worse at the end; [T, C]."""
    columns = [0.3 + 0.2 * c + (1 + 0.5 * c) * np.exp(-time * (6 + 5 * c)) for c in range(channels)]
    columns[1] = columns[1] + 0.5 * time**2
    return np.stack(columns, axis=1)


def mixes(windows: int, seed: int, samples: int = 8) -> tuple[Floats, Floats]:
    """Shares [T, C] and tokens [T] of random batches with samples of different lengths."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(samples, [0.4, 0.3, 0.2, 0.1], size=windows)
    tokens = counts * rng.uniform(20, 200, counts.shape)
    return tokens / tokens.sum(1, keepdims=True), tokens.sum(1)


def noisy(true: Floats, weights: Floats, tokens: Floats, seed: int) -> Floats:
    """The losses of the windows: every channel scatters as the mean of its tokens does."""
    rng = np.random.default_rng(seed)
    own = np.maximum(weights * tokens[:, None], 1)
    losses = true + rng.normal(size=true.shape) * 3 * np.sqrt(true / own)
    return np.asarray((weights * losses).sum(1))


def check_bands(found: Estimate, steps: NDArray[np.int64], true: Floats) -> tuple[float, float]:
    """(the part of the points in their band, root mean square error), of identifiable ones."""
    at = np.stack([np.interp(found.steps, steps, column) for column in true.T], axis=1)
    good = found.identifiable
    inside = (found.low <= at) & (at <= found.high)
    return float(inside[good].mean()), float(np.sqrt(((found.loss - at)[good] ** 2).mean()))


def test_bands_hold_the_truth_and_are_of_use() -> None:
    steps = np.arange(1, 401)
    true = curves(steps / 400)
    inside, errors, widths = [], [], []
    for seed in range(5):
        weights, tokens = mixes(400, seed)
        losses = noisy(true, weights, tokens, seed)
        found = estimate_curves(steps, losses, weights, tokens)
        assert found.identifiable.mean() > 0.9
        part, error = check_bands(found, steps, true)
        inside.append(part)
        errors.append(error)
        widths.append(float((found.high - found.low)[found.identifiable].mean() / 2))
    by_whole = np.sqrt(((losses[:, None] - true) ** 2).mean())
    assert np.mean(inside) > 0.93
    assert np.mean(errors) < by_whole / 3
    # A band that holds everything would say nothing.
    assert np.mean(widths) < 3 * np.mean(errors)


def test_without_noise_constant_losses_are_found() -> None:
    weights, _ = mixes(200, 0)
    found = estimate_curves(np.arange(200), weights @ [1.0, 2.0, 3.0, 4.0], weights)
    assert found.loss == pytest.approx(np.tile([1.0, 2, 3, 4], (len(found.steps), 1)), abs=0.01)


@pytest.mark.parametrize("windows", [20, 400])
def test_a_mix_that_never_varies_identifies_nothing(windows: int) -> None:
    weights = np.tile([0.4, 0.3, 0.2, 0.1], (windows, 1))
    losses = noisy(curves(np.linspace(0, 1, windows)), weights, np.full(windows, 1000.0), 0)
    assert not estimate_curves(np.arange(windows), losses, weights).identifiable.any()


def test_two_that_always_come_together_are_not_told_apart_and_the_others_are() -> None:
    steps = np.arange(1, 401)
    three, tokens = mixes(400, 3)
    weights = np.stack([three[:, 0], three[:, 1], three[:, 2] * 0.6, three[:, 2] * 0.4], axis=1)
    weights += three[:, 3:] * [1, 0, 0, 0]
    true = curves(steps / 400)
    found = estimate_curves(steps, noisy(true, weights, tokens, 3), weights, tokens)
    assert found.identifiable[:, :2].mean() > 0.95
    assert found.identifiable[:, 2:].mean() < 0.1
    assert check_bands(found, steps, true)[0] > 0.93


def test_a_channel_that_ends_becomes_less_certain_from_there_on() -> None:
    steps = np.arange(1, 401)
    weights, tokens = mixes(400, 4)
    weights[200:, 2] = 0
    weights /= weights.sum(1, keepdims=True)
    found = estimate_curves(steps, noisy(curves(steps / 400), weights, tokens, 4), weights, tokens)
    width = found.high - found.low
    at_200, at_end = np.searchsorted(found.steps, 180), -1
    assert width[at_end, 2] > 2 * width[at_200, 2]
    assert width[at_end, 0] < 2 * width[at_200, 0]


def test_fits_that_disagree_make_the_band_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of 0 and 2 * time, variances of 1 and 1 + time; they weigh 3 to 1. The second one has
    a pace, so its knots are at other times."""
    shape, unit = (8, 2), np.linspace(0, 1, 8)
    time = np.stack([unit, unit], axis=1)
    knots = (11**time - 1) / 10
    without = Fit(-np.inf, 1.0, np.full(shape, 99.0), np.ones(shape))
    fits = [without] * 27
    fits[0] = Fit(np.log(3.0), 4.0, np.zeros(shape), np.ones(shape))
    fits[9] = Fit(0.0, 16.0, 2 * knots, 1 + knots)
    waiting = iter(fits)
    monkeypatch.setattr(estimator, "fit_curves", lambda equations, walk: next(waiting))
    weights, _ = mixes(20, 0)
    data = estimator._Data(np.linspace(0, 1, 20), np.ones(20), weights[:, :2], np.ones(20), 1.0)
    mean, variance, noise = estimator._average(data, 1.0, unit)
    assert mean == pytest.approx(0.5 * time)
    wanted = 0.75 * (1 + (0.5 * time) ** 2) + 0.25 * (1 + time + (1.5 * time) ** 2)
    assert variance == pytest.approx(wanted)
    assert noise == pytest.approx(0.75 * 2 + 0.25 * 4)


def test_what_cannot_be_estimated_is_an_error_that_says_why() -> None:
    weights, _ = mixes(30, 0)
    steps, losses = np.arange(30), np.ones(30)
    with pytest.raises(ChannelMetricsError, match=r"at least 20 windows .* there are 19"):
        estimate_curves(steps[:19], losses[:19], weights[:19])
    with pytest.raises(ChannelMetricsError, match=r"\(30,\), \(29,\) and \(30, 4\)"):
        estimate_curves(steps, losses[1:], weights)
    losses[3] = np.nan
    with pytest.raises(ChannelMetricsError, match="finite"):
        estimate_curves(steps, losses, weights)


def history(windows: int = 300, seed: int = 0) -> list[dict[str, float]]:
    """A log with channel metrics in every step; its loss is the mean over the tokens."""
    true = curves(np.linspace(0, 1, windows))
    weights, tokens = mixes(windows, seed)
    rng = np.random.default_rng(seed)
    entries = []
    for row in range(windows):
        entry: dict[str, float] = {"step": row + 1}
        own = np.rint(weights[row] * tokens[row])
        losses = true[row] + rng.normal(size=4) * np.sqrt(true[row] / np.maximum(own, 1))
        for name, loss, count in zip(NAMES, losses, own, strict=True):
            if count:
                entry |= {f"{name}_loss": float(loss), f"{name}_tokens": int(count)}
        entry["loss"] = float((own * losses).sum() / own.sum())
        entries.append(entry)
    return entries


# Of 300 windows, and of 60, which is little for four channels.
@pytest.mark.parametrize(("every", "part", "inside"), [(1, 0.5, 0.93), (5, 0.8, 0.8)])
def test_measured_losses_that_were_hidden_are_found_again(
    every: int, part: float, inside: float
) -> None:
    entries = history()
    run, mix = hide(entries, NAMES, every)
    assert not any(run.has(name, "loss") for name in NAMES)
    estimated = with_estimates(run, mix)
    found = compare(entries, NAMES, estimated)
    assert found["points"] > 30
    assert found["rmse"] < found["rmse_of_whole"] * part
    assert found["inside"] > inside
    assert series_of(estimated, GLOBAL, "loss") == series_of(run, GLOBAL, "loss")
    assert any("95 % bands" in note for note in estimated.problems.notes)


def test_a_log_with_token_counts_needs_no_mix_and_measured_losses_are_left_alone() -> None:
    entries = history()
    hidden = [{k: v for k, v in e.items() if not k.endswith("_loss")} for e in entries]
    estimated = with_estimates(run_of(hidden, channels=NAMES))
    assert compare(entries, NAMES, estimated)["inside"] > 0.9
    measured = run_of(entries)
    assert with_estimates(measured) is measured


def test_what_is_not_identifiable_is_left_out_and_said() -> None:
    entries = [
        {"step": s, "loss": 2.0 + 0.1 * (s % 7), "a_tokens": 100, "a_samples": 1, "b_tokens": 300}
        for s in range(1, 60)
    ]
    run = with_estimates(run_of(entries, channels=["a", "b"]))
    assert not run.has("a", "loss_estimate")
    notes = [note for note in run.problems.notes if "not identifiable" in note]
    assert [note.split(":")[0] for note in notes] == ["a", "b"]
    short = with_estimates(run_of(entries[:10], channels=["a", "b"]))
    assert "10 windows have a loss and a mix" in short.problems.notes[0]
