"""Learning speed, epochs and budgets: against the oracle, and by hand."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import slope as exact_slope
from session_tools import batch, new

from channel_metrics import ChannelMetrics, ConfigError, MetricsConfig
from channel_metrics.core.progress import PROGRESS, WINDOWS, Point, slope
from channel_metrics.trainers.wanted import check_wanted

NAMES = tuple(metric.name for metric in PROGRESS)


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
    metrics = new(metrics=NAMES, source_tokens={"a": 20}, token_budget={"a": 100, "b": 4})
    a = [("a", 10, 4 - 0.5 * i) for i in range(4)]
    logs = run(metrics, (5, a[:1]), (10, [a[1], ("b", 4, 1.0)]), (15, a[2:3]), (20, a[3:]))
    assert logs[0] == {"a_epochs": 0.5, "a_budget_share": 0.1}  # no rate yet
    assert logs[1] == {
        "a_epochs": 1.0,
        "a_budget_share": 0.2,
        "a_eta_steps": 40.0,  # 80 tokens are left, and 5 steps have 10
        "b_budget_share": 1.0,
        "b_eta_steps": 0.0,
    }
    assert logs[3] == {
        "a_loss_slope": pytest.approx(-0.05e6),
        "a_loss_slope_se": pytest.approx(0.0, abs=1e-6),
        "a_epochs": 2.0,
        "a_budget_share": 0.4,
        "a_eta_steps": pytest.approx(30.0),
    }


def test_steps_without_a_channel_count_in_its_rate() -> None:
    metrics = new(metrics=("eta_steps",), token_budget={"a": 100})
    logs = run(metrics, (1, [("a", 10, 1.0)]), (2, [("b", 10, 1.0)]), (3, [("a", 10, 1.0)]))
    assert logs[2] == {"a_eta_steps": 16.0}  # 80 tokens at 5 a step


def test_only_the_last_windows_are_looked_at() -> None:
    metrics = new(metrics=("loss_slope", "eta_steps"), token_budget={"a": 10_000})
    old = [(step, [("a", 100, 9.0)]) for step in range(1, 6)]
    last = [(step, [("a", 10, 2.0)]) for step in range(6, 6 + WINDOWS)]
    logs = run(metrics, *old, *last)[-1]
    assert logs["a_loss_slope"] == 0
    assert logs["a_eta_steps"] == pytest.approx((10_000 - 500 - 10 * WINDOWS) / 10)


def test_labels_and_unlabeled_have_them_and_others_do_not() -> None:
    metrics = new(
        metrics=("epochs", "tokens"),
        axes={"kind": {"a": "x", "b": "x"}},
        top=1,
        source_tokens={"kind/x": 10, "unlabeled": 1, "a": 5, "b": 5},
    )
    (logs,) = run(metrics, (1, [("a", 5, 1.0), ("b", 4, 1.0), (None, 2, 1.0)]))
    epochs = {key: value for key, value in logs.items() if key.endswith("_epochs")}
    assert epochs == {"kind/x_epochs": 0.9, "unlabeled_epochs": 2.0, "a_epochs": 1.0}
    assert logs["others_tokens"] == 4


def test_evaluations_and_open_windows_have_none() -> None:
    metrics = new(metrics=("loss", "epochs"), source_tokens={"a": 5})
    metrics.count(batch(("a", 5, 1.0)))
    assert metrics.peek(1).logs == {"a_loss": 1.0}
    with metrics.evaluation("eval", 1) as found:
        metrics.count(batch(("a", 5, 1.0)))
    assert found.logs == {"eval_a_loss": 1.0}
    assert metrics.close(1).logs == {"a_loss": 1.0, "a_epochs": 1.0}


def test_a_resumed_run_goes_on_with_its_tokens_and_forgets_the_windows(tmp_path: Path) -> None:
    config: dict[str, Any] = {"source_tokens": {"a": 20}, "token_budget": {"a": 100}}
    metrics = new(metrics=NAMES, **config)
    windows = [(step, [("a", 10, 1.0)]) for step in (1, 2, 3)]
    run(metrics, *windows)
    metrics.save(tmp_path, is_writer=True)
    metrics.start(tmp_path)
    logs = run(metrics, (9, [("a", 10, 1.0)]), (10, [("a", 10, 1.0)]))
    assert logs[0] == {"a_epochs": 2.0, "a_budget_share": 0.4}
    assert logs[1]["a_eta_steps"] == 5.0  # not over the steps that another run made


def test_a_name_that_never_comes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(metrics=("epochs",), source_tokens={"web_text": 9})
    with caplog.at_level(logging.WARNING):
        run(metrics, *((step, [("webtext", 3, 1.0)]) for step in (1, 2)))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "source_tokens names 'web_text'" in said and "did you mean 'webtext'" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source_tokens": {"a": 5}}, "source_tokens and the metric 'epochs' need each other"),
        ({"metrics": ("epochs",)}, "only the metric was given"),
        ({"metrics": ("eta_steps",)}, "'budget_share' and 'eta_steps' need each other"),
        ({"token_budget": {"a": 0}}, "numbers above 0, but is {'a': 0}"),
        ({"token_budget": 10}, "must be a mapping of channels to numbers above 0, but is 10"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetricsConfig(**given)


def test_they_can_be_watched_in_training_only() -> None:
    metrics = new("a", metrics=("loss", "loss_slope"))
    sets = {"": {"a"}, "eval_": {"a"}}
    assert "a_loss_slope" in check_wanted(metrics, "a_loss_slope", sets, "x")
    with pytest.raises(ConfigError, match="add 'loss_slope' to"):
        check_wanted(metrics, "eval_a_loss_slope", {"eval_": {"a"}}, "x")


def test_off_is_free() -> None:
    metrics = new(metrics=("loss", "tokens_total"))
    run(metrics, (1, [("a", 5, 1.0)]))
    assert not metrics._maker._progress._windows
