"""The slope of the loss: against the oracle, and by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import slope as exact_slope
from session_tools import batch, new

from channel_metrics import ChannelMetrics, ConfigError
from channel_metrics.core.slopes import SLOPES, WINDOWS, Point, slope
from channel_metrics.trainers.wanted import check_wanted

NAMES = tuple(metric.name for metric in SLOPES)


def of_windows(windows: list[tuple[int, float]], before: int = 0) -> list[Point]:
    points, total = [], before
    for tokens, loss in windows:
        total += tokens
        points.append(Point(total, tokens, tokens, tokens * loss))
    return points


@given(
    st.lists(st.tuples(st.integers(1, 5_000), st.floats(0, 20)), min_size=3, max_size=WINDOWS),
    st.integers(0, 10**9),
)
def test_the_slope_is_the_oracles(windows: list[tuple[int, float]], before: int) -> None:
    """Also late in a run, where the tokens so far are a large number."""
    found, exact = slope(of_windows(windows, before)), exact_slope(windows)
    assert found is not None and exact is not None
    scale = max(loss for _, loss in windows) / sum(tokens for tokens, _ in windows)
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-5 * scale)


def test_its_error_holds_the_true_slope_as_often_as_it_should() -> None:
    """Losses of windows of many sizes on a true line: +-2.101 errors is Student's 95 % with 18
    degrees of freedom."""
    rng, held, runs = random.Random(3), 0, 2_000
    for _ in range(runs):
        windows, total = [], 0
        for _ in range(20):
            tokens = rng.randint(10, 1_000)
            truth = 4 - 1e-4 * (total + tokens / 2)
            windows.append((tokens, truth + rng.gauss(0, 1) / tokens**0.5))
            total += tokens
        found = slope(of_windows(windows))
        assert found is not None
        held += abs(found[0] + 1e-4) < 2.101 * found[1]
    assert 0.93 < held / runs < 0.97


def test_two_windows_have_no_error_so_they_have_no_slope() -> None:
    assert slope(of_windows([(5, 1.0), (5, 2.0)])) is None
    lost = [Point(15, 5, 0, 0.0), *of_windows([(5, 1.0), (5, 2.0)])]
    assert slope(lost) is None  # all losses of a window were NaN


def run(metrics: ChannelMetrics, *windows: tuple[int, Any]) -> list[dict[str, float]]:
    """(step, counts of the window) of each; returns the logs."""
    logs = []
    for step, counts in windows:
        metrics.count(batch(*counts))
        logs.append(metrics.close(step).logs)
    return logs


def test_windows_of_a_session() -> None:
    """`a` has 10 tokens a window and falls by 0.5; `b` is in one window only."""
    metrics = new(metrics=NAMES)
    a = [("a", 10, 4 - 0.5 * i) for i in range(4)]
    logs = run(metrics, (5, a[:1]), (10, [a[1], ("b", 4, 1.0)]), (15, a[2:3]), (20, a[3:]))
    assert logs[:2] == [{}, {}]
    assert logs[3] == {
        "a_loss_slope": pytest.approx(-0.05e6),
        "a_loss_slope_se": pytest.approx(0.0, abs=1e-6),
    }


def test_only_the_last_windows_are_looked_at() -> None:
    metrics = new(metrics=("loss_slope",))
    old = [(step, [("a", 100, 9.0)]) for step in range(1, 6)]
    last = [(step, [("a", 10, 2.0)]) for step in range(6, 6 + WINDOWS)]
    assert run(metrics, *old, *last)[-1] == {"a_loss_slope": 0.0}


def test_labels_and_unlabeled_have_them_and_others_do_not() -> None:
    metrics = new(metrics=("loss_slope", "tokens"), axes={"kind": {"a": "x", "b": "x"}}, top=1)
    counts = [("a", 5, 1.0), ("b", 4, 1.0), (None, 2, 1.0)]
    logs = run(metrics, *((step, counts) for step in (1, 2, 3)))[-1]
    slopes = {key for key in logs if key.endswith("_loss_slope")}
    assert slopes == {f"{row}_loss_slope" for row in ("a", "kind/x", "unlabeled", "kind/unlabeled")}
    assert logs["others_tokens"] == 4


def test_evaluations_and_open_windows_have_none() -> None:
    metrics = new(metrics=("loss", "loss_slope"))
    run(metrics, *((step, [("a", 5, 1.0)]) for step in (1, 2)))
    metrics.count(batch(("a", 5, 1.0)))
    assert metrics.peek(3).logs == {"a_loss": 1.0}
    with metrics.evaluation("eval", 3) as found:
        metrics.count(batch(("a", 5, 1.0)))
    assert found.logs == {"eval_a_loss": 1.0}
    assert metrics.close(3).logs == {"a_loss": 1.0, "a_loss_slope": 0.0}


def test_a_resumed_run_forgets_the_windows(tmp_path: Path) -> None:
    metrics = new(metrics=NAMES)
    run(metrics, *((step, [("a", 10, 9.0)]) for step in (1, 2, 3)))
    metrics.save(tmp_path, is_writer=True)
    metrics.start(tmp_path)
    logs = run(metrics, *((step, [("a", 10, 1.0)]) for step in (4, 5, 6)))
    assert logs[:2] == [{}, {}] and logs[2]["a_loss_slope"] == 0


def test_they_can_be_watched_in_training_only() -> None:
    metrics = new("a", metrics=("loss", "loss_slope"))
    sets = {"": {"a"}, "eval_": {"a"}}
    assert "a_loss_slope" in check_wanted(metrics, "a_loss_slope", sets, "x")
    with pytest.raises(ConfigError, match="add 'loss_slope' to"):
        check_wanted(metrics, "eval_a_loss_slope", {"eval_": {"a"}}, "x")


def test_off_is_free() -> None:
    metrics = new(metrics=("loss", "tokens_total"))
    run(metrics, (1, [("a", 5, 1.0)]))
    assert not metrics._maker._slopes._windows
