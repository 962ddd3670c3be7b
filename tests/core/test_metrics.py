"""Sums of one channel -> values, in plain numbers."""

from __future__ import annotations

import math

import pytest

from channel_metrics import ConfigError
from channel_metrics.core.metrics import ALL_METRICS, WINDOW_METRICS, channel_values, check_metrics
from channel_metrics.core.sums import COLUMNS


def sums(**given: float) -> dict[str, float]:
    return {**dict.fromkeys(COLUMNS, 0.0), **given}


def test_values() -> None:
    channel = sums(tokens=4, samples=2, nll=6, correct=3, judged=4, weighted_nll=5, weight=2.5)
    assert channel_values(channel, 16, WINDOW_METRICS) == {
        "loss": 1.5,
        "weighted_loss": 2.0,
        "token_acc": 0.75,
        "ppl": math.exp(1.5),
        "tokens": 4,
        "samples": 2,
        "share": 0.25,
    }


def test_what_was_not_measured_is_absent() -> None:
    assert channel_values(sums(tokens=2, nll=1), 2, WINDOW_METRICS) == {
        "loss": 0.5,
        "ppl": math.exp(0.5),
        "tokens": 2,
        "samples": 0,
        "share": 1.0,
    }


def test_nonfinite_tokens_are_shown_and_not_mixed_in() -> None:
    some = channel_values(sums(tokens=4, nonfinite=1, nll=6), 4, ["loss", "tokens"])
    assert some == {"loss": 2.0, "tokens": 4, "nonfinite": 1}
    assert channel_values(sums(tokens=2, nonfinite=2), 4, ["loss", "ppl", "share"]) == {
        "share": 0.5,
        "nonfinite": 2,
    }


def test_ppl_that_is_too_large_for_a_float() -> None:
    assert channel_values(sums(tokens=1, nll=1e4), 1, ["ppl"]) == {"ppl": math.inf}


def test_accuracy_is_of_the_tokens_that_were_judged() -> None:
    assert channel_values(sums(tokens=10, correct=1, judged=2), 10, ["token_acc"]) == {
        "token_acc": 0.5
    }


def test_metric_names() -> None:
    assert check_metrics(["tokens", "loss", "tokens"]) == ("tokens", "loss")
    assert check_metrics([]) == ()
    assert check_metrics(["tokens_total"], ALL_METRICS) == ("tokens_total",)
    with pytest.raises(ConfigError, match="unknown metric 'tokens_total'; did you mean 'tokens'"):
        check_metrics(["tokens_total"])
    with pytest.raises(ConfigError, match="unknown metric 'los'; did you mean 'loss'"):
        check_metrics(["los"])
    with pytest.raises(ConfigError, match="unknown metric 'zzz'; Known: loss, weighted_loss"):
        check_metrics(["zzz"])
