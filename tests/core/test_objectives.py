"""Objectives over channels: their values, their keys, and who is asked to choose by them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from session_tools import batch

from channel_metrics import ChannelMetrics, ConfigError, MetricsConfig
from channel_metrics.analysis.readers.keys import GLOBAL, decode_keys
from channel_metrics.trainers.wanted import check_wanted

ALL = ("macro_loss", "worst_loss", "weighted_loss_of_channels")


def session(*metrics: str, **given: Any) -> ChannelMetrics:
    return ChannelMetrics(MetricsConfig(metrics=metrics, **given))


def test_values_by_hand() -> None:
    """a has 6 tokens of loss 1, b has 1 of loss 4: the mean over tokens would be 1.43."""
    metrics = session("loss", *ALL, channel_weights={"a": 3, "b": 1})
    metrics.count(batch(("a", 6, 1.0), ("b", 1, 4.0), (None, 2, 9.0)))
    window = metrics.peek(1)
    assert {key: window.logs[key] for key in ALL} == {
        "macro_loss": 2.5,
        "worst_loss": 4.0,
        "weighted_loss_of_channels": 1.75,
    }
    assert window.worst_channel == "b"
    assert set(window.values) == {"a", "b", "unlabeled"}
    assert not any(key in values for key in ALL for values in window.values.values())


def test_they_need_no_other_metric_and_are_off_by_default() -> None:
    metrics = session("macro_loss")
    metrics.count(batch(("a", 6, 1.0), ("b", 1, 4.0)))
    assert metrics.close(1).logs == {"macro_loss": 2.5}
    metrics = session("loss")
    metrics.count(batch(("a", 6, 1.0)))
    window = metrics.close(1)
    assert window.logs == {"a_loss": 1.0} and window.worst_channel == ""


def test_evaluations_take_the_channels_that_they_log() -> None:
    metrics = session("loss", "macro_loss", "worst_loss", eval_channels=("a", "c"))
    with metrics.evaluation("eval", 1) as found:
        metrics.count(batch(("a", 6, 1.0), ("b", 1, 4.0), ("c", 1, 2.0)))
    assert found.logs["eval_macro_loss"] == 1.5 and found.logs["eval_worst_loss"] == 2.0
    assert found.window is not None and found.window.worst_channel == "c"
    metrics.count(batch(("a", 6, 1.0), ("b", 1, 4.0), ("c", 1, 1.0)))
    assert metrics.close(1).logs["macro_loss"] == 2.0, "the training logs all of them"


def test_a_window_without_losses_has_none() -> None:
    metrics = session("macro_loss", "worst_loss", "tokens")
    metrics.count(batch((None, 2, 1.0)))
    assert set(metrics.close(1).logs) == {"unlabeled_tokens"}
    metrics.count(batch(("a", 1, float("nan")), ("b", 1, 2.0)))
    assert metrics.close(2).logs["macro_loss"] == 2.0  # of the channel that has a loss


def test_weights_without_their_channel_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Another set of channels would be another objective, so there is no value."""
    metrics = session("loss", "weighted_loss_of_channels", channel_weights={"code": 1, "web": 2})
    with caplog.at_level(logging.WARNING):
        metrics.close(0)  # an empty window lacks nothing
        for step in (1, 2):
            metrics.count(batch(("cod", 6, 1.0), ("web", 1, 4.0)))
            assert "weighted_loss_of_channels" not in metrics.close(step).logs
    (said,) = [record.getMessage() for record in caplog.records]
    assert "without a loss of code" in said and "did you mean 'cod'" in said


@pytest.mark.parametrize(
    "given",
    [
        {"metrics": ("weighted_loss_of_channels",)},
        {"channel_weights": {"a": 1.0}},
        {"metrics": ("weighted_loss_of_channels",), "channel_weights": {"a": 0}},
        {"metrics": ("weighted_loss_of_channels",), "channel_weights": {"a": float("inf")}},
        {"metrics": ("weighted_loss_of_channels",), "channel_weights": ["a"]},
    ],
)
def test_weights_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="channel_weights"):
        MetricsConfig(**given)


def test_a_channel_cannot_have_the_key_of_an_objective() -> None:
    with pytest.raises(ConfigError, match="'macro_loss', which is the key of an objective"):
        session("loss", "macro_loss", channels=("macro",))
    session("loss", channels=("macro",))  # nothing else has this key


def test_they_can_be_watched_if_they_are_logged() -> None:
    metrics = session("loss", "macro_loss", channels=("a",))
    assert "eval_macro_loss" in check_wanted(metrics, "eval_macro_loss", {"eval_": {"a"}}, "x")
    with pytest.raises(ConfigError, match="'worst_loss' is not among `metrics`"):
        check_wanted(metrics, "eval_worst_loss", {"eval_": {"a"}}, "x")


def test_readers_take_them_for_no_channel() -> None:
    keys = [*ALL, *(f"eval_{name}" for name in ALL)]
    assert {key.channel for key in decode_keys(keys).values()} == {GLOBAL}
    mixed = decode_keys([*keys, "a_loss", "a_tokens"])
    assert {key.channel for key in mixed.values()} == {GLOBAL, "a"}


def test_they_are_the_same_whatever_the_order_of_names() -> None:
    first, second = session("macro_loss", "worst_loss"), session("macro_loss", "worst_loss")
    counts = (("a", 6, 0.1), ("b", 1, 0.7), ("c", 3, 0.7))
    first.count(batch(*counts))
    second.count(batch(*counts[::-1]))
    one, other = first.close(1), second.close(1)
    assert one.logs == pytest.approx(other.logs)
    assert one.table[0] == other.table[0]
