"""Columns and metrics: values from sums, names, and what may be registered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from channel_metrics import ChannelLossAccumulator, ConfigError
from channel_metrics.core.schema import TOKENS, Column, Metric, Schema, ratio

WINDOW_METRICS = TOKENS.window_metrics


def sums(**given: float) -> dict[str, float]:
    return {**dict.fromkeys(TOKENS.column_names, 0.0), **given}


def channel_values(
    channel: dict[str, float], all_tokens: float, names: Sequence[str]
) -> dict[str, float]:
    return TOKENS.values(channel, all_tokens, TOKENS.chosen(names))


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
    assert TOKENS.check(["tokens", "loss", "tokens"]) == ("tokens", "loss")
    assert TOKENS.check([]) == ()
    assert TOKENS.check(["tokens_total"]) == ("tokens_total",)
    with pytest.raises(ConfigError, match="unknown metric 'tokens_total'; did you mean 'tokens'"):
        TOKENS.check(["tokens_total"], WINDOW_METRICS)
    with pytest.raises(ConfigError, match="unknown metric 'los'; did you mean 'loss'"):
        TOKENS.check(["los"])
    with pytest.raises(ConfigError, match="unknown metric 'zzz'; known are loss, weighted_loss"):
        TOKENS.check(["zzz"])
    with pytest.raises(ConfigError, match="unknown metric 'nonfinite'"):
        TOKENS.check(["nonfinite"])  # logged by itself, where there is one


def test_the_token_schema() -> None:
    assert tuple(column.name for column in TOKENS.columns if not column.optional) == (
        "tokens", "samples", "nll", "correct", "judged", "nonfinite", "weighted_nll", "weight",
        "nonfinite_weight",
    )  # fmt: skip
    assert TOKENS.total_names == ("tokens", "samples")
    assert TOKENS.run_metrics == ("tokens_total", "samples_total")
    assert TOKENS.extra_metrics == (
        "loss_slope", "loss_slope_se", "grad_share", "grad_norm", "grad_cosine", "grad_noise",
    )  # fmt: skip
    assert WINDOW_METRICS == (
        "loss", "weighted_loss", "token_acc", "ppl", "tokens", "samples", "share",
        "bits_per_byte", "bits_per_char", "entropy",
        "loss_se", "loss_low", "loss_high", "token_acc_se", "token_acc_low", "token_acc_high",
        "loss_p10", "loss_p50", "loss_p90", "excess_loss",
    )  # fmt: skip
    assert sorted(TOKENS.metric_names) == sorted(
        (*WINDOW_METRICS, "nonfinite", "tokens_total", "samples_total", *TOKENS.extra_metrics)
    )
    assert {m.name for m in TOKENS.metrics if m.adds_up} == {"tokens", "samples", "nonfinite"}


def easy() -> tuple[Column, Metric]:
    return (
        Column("easy", "tokens", "tokens with a loss below 1", per_token=lambda v: v.losses < 1),
        Metric("easy_share", ("easy", "tokens"), lambda s: ratio(s["easy"], s["tokens"])),
    )


def test_what_is_registered_is_counted_and_logged() -> None:
    schema = TOKENS.extended(*easy())
    assert "easy" not in TOKENS.column_names and "easy_share" not in TOKENS.metric_names
    accumulator = ChannelLossAccumulator(["a"], metrics=["easy_share", "tokens"], schema=schema)
    losses = torch.tensor([0.5, 2.0, 0.25, 0.125])
    accumulator.update(losses, channels=["a"], loss_mask=torch.tensor([1, 1, 1, 0]))
    assert accumulator.compute() == {"a_easy_share": 2 / 3, "a_tokens": 3.0}
    schema.register(Column("late", "tokens", "registered after the accumulator was made"))
    assert accumulator.sums().shape == (2, len(ChannelLossAccumulator().columns) + 1)


def test_a_total_of_ones_own() -> None:
    schema = Schema("pairs", count="pairs")
    schema.register(
        Column("pairs", "pairs", "preference pairs", total=True),
        Column("chosen", "reward", "rewards of the chosen"),
        Metric("reward", ("chosen", "pairs"), lambda s: ratio(s["chosen"], s["pairs"])),
        Metric("share", ("pairs", "all"), lambda s: ratio(s["pairs"], s["all"])),
    )
    assert schema.run_metrics == ("pairs_total",)
    given = {"pairs": 2.0, "chosen": 3.0}
    assert schema.values(given, 8, schema.metrics) == {"reward": 1.5, "share": 0.25}
    assert schema.values({"pairs": 0.0, "chosen": 0.0}, 8, schema.metrics) == {"share": 0.0}
    assert schema.metric("reward") is schema.metrics[0] and schema.metric("pairs_total") is None


def test_metrics_that_one_name_asks_for() -> None:
    schema = TOKENS.extended(
        Metric("margin", (), lambda s: 1.0, asked_by=("rewards", "loss")),
        Metric("always", (), lambda s: 2.0, always=True),
    )
    names = [metric.name for metric in schema.chosen(["rewards", "tokens", "loss"])]
    assert names == ["margin", "tokens", "loss", "nonfinite", "always"]
    assert [metric.name for metric in schema.chosen(["margin"])] == ["nonfinite", "always"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (lambda: Column("nll", "nats", ""), "'nll' is registered already for tokens"),
        (lambda: Metric("loss", (), lambda s: 0.0), "'loss' is registered already for tokens"),
        (lambda: Metric("tokens_total", (), lambda s: 0.0), "'tokens_total' is registered already"),
        (
            lambda: Metric("easy_share", ("easy", "tokens"), lambda s: 0.0),
            "metric 'easy_share' needs the columns easy, but there are tokens, samples, nll, "
            "correct, judged, nonfinite, weighted_nll, weight, nonfinite_weight, ",
        ),
    ],
)
def test_refuses(entry: Callable[[], Column | Metric], message: str) -> None:
    before = TOKENS.column_names, TOKENS.metric_names
    with pytest.raises(ConfigError, match=message):
        TOKENS.register(entry())
    assert (TOKENS.column_names, TOKENS.metric_names) == before
