"""The rules of the setting `sampler`, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from session_tools import new

from channel_metrics import ChannelMetrics, MicroBatch, MixedStream
from channel_metrics.data.weights import speed

NAMES = ("a", "b")
START = {"a": 3, "b": 1}


def session(**sampler: Any) -> ChannelMetrics:
    """With a stream that has given more than is trained on."""
    metrics = new(metrics=("loss",), sampler={"start": START, **sampler})
    stream = MixedStream({name: [{}] for name in NAMES}, lag=100)
    stream.follow(metrics)
    stream.plan.drawn[0] = 100
    return metrics


def weights(metrics: ChannelMetrics) -> dict[str, float]:
    return dict(metrics.totals.notes["sampler"]["weights"])


def window(metrics: ChannelMetrics, step: int, *losses: list[float]) -> None:
    """A row per channel."""
    metrics.count(MicroBatch(token_losses=torch.tensor(losses), channels=NAMES))
    metrics.close(step)


def in_proportion(scores: dict[str, float]) -> Any:
    whole = sum(scores.values())
    return pytest.approx({name: score / whole for name, score in scores.items()})


def test_losses_without_the_tokens_that_are_not_finite() -> None:
    metrics = session()
    window(metrics, 1, [math.nan, 2.0], [1.0, 5.0])
    assert weights(metrics) == in_proportion({"a": 3 * 2.0, "b": 1 * 3.0})


def test_an_evaluation_changes_nothing() -> None:
    metrics = session()
    with metrics.evaluation("eval", 1):
        metrics.count(MicroBatch(token_losses=torch.tensor([[1.0], [9.0]]), channels=NAMES))
    assert weights(metrics) == {"a": 0.75, "b": 0.25}


def test_an_excess_below_0_counts_as_0() -> None:
    metrics = session(rule="excess", reference={"a": 3.0, "b": 1.0})
    window(metrics, 1, [2.0], [1.5])
    assert weights(metrics) == in_proportion({"a": 0.75, "b": 0.25 * math.exp(0.5)})


def test_learning_speed() -> None:
    metrics = session(rule="speed", warmup=2)
    for step in range(1, 9):
        held = weights(metrics)
        window(metrics, step, [1 + 8 * step**-0.4] * 2, [2 + 4 * step**-0.3] * 2)
    points = metrics.totals.notes["sampler"]["points"]
    assert len(points["a"]) == 8 - 2 and held["a"] != 0.75
    # Two tokens of each channel, and four of the run in each window.
    assert points["a"][-1] == pytest.approx([2 * math.log(8 * 4), 2 * (1 + 8 * 8**-0.4), 2])
    speeds = {name: speed(points[name], 8 * 4.0) or 0.0 for name in NAMES}
    assert weights(metrics) == in_proportion(
        {n: START[n] * math.sqrt(held[n] * (1 - held[n])) * speeds[n] for n in NAMES}
    )
