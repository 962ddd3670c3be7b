"""`ChannelMetrics`: evaluations, which are windows of their own."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch
from session_tools import Seen, batch, new, tokens

from channel_metrics import ConfigError, MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.schema import Column, Metric, Schema, ratio
from channel_metrics.session import ChannelMetrics
from channel_metrics.windows import Evaluation, Window


def test_evaluations_are_windows_of_their_own() -> None:
    seen = Seen()
    metrics = new("a", metrics=("loss", "tokens", "tokens_total"), on_window=[seen])
    metrics.count(batch(("a", 1, 1.0)))
    metrics.begin_step()
    metrics.count(batch(("a", 2, 1.0)))
    with metrics.evaluation("code", 5, prefix="eval_code_") as evaluation:
        assert metrics.evaluating and evaluation.logs == {} and evaluation.window is None
        metrics.count(batch(("a", 7, 3.0)))
    window = evaluation.window
    assert window is not None and not metrics.evaluating
    assert (window.split, window.step, window.prefix) == ("code", 5, "eval_code_")
    # No totals: they are of what was trained on.
    assert evaluation.logs == {"eval_code_a_loss": 3.0, "eval_code_a_tokens": 7.0}
    metrics.count(batch(("a", 3, 1.0)))
    assert metrics.close(6).values == {"a": {"loss": 1.0, "tokens": 6.0, "tokens_total": 6}}
    assert [window.split for window in seen] == ["code", "train"]


def test_nested_evaluations() -> None:
    metrics = new()
    with metrics.evaluation("outer", 1) as outer:
        metrics.count(batch(("a", 1, 1.0)))
        with metrics.evaluation("inner", 1, prefix="inner_") as inner:
            metrics.count(batch(("a", 2, 1.0)))
        metrics.count(batch(("a", 4, 1.0)))
    assert (outer.logs["eval_a_tokens"], inner.logs["inner_a_tokens"]) == (5, 2)
    assert metrics.close(1).values == {}


def test_an_evaluation_that_raises_is_dropped() -> None:
    metrics = new()
    metrics.count(batch(("a", 1, 1.0)))

    def evaluate() -> None:
        with metrics.evaluation("outer", 1) as outer:
            opened.append(outer)
            metrics.count(batch(("a", 2, 1.0)))
            with metrics.evaluation("inner", 1) as inner:
                opened.append(inner)
                metrics.count(batch(("a", 4, 1.0)))
                raise KeyError

    opened: list[Evaluation] = []
    with pytest.raises(KeyError):
        evaluate()
    outer, inner = opened
    assert outer.window is None and inner.window is None and not metrics.evaluating
    with metrics.evaluation("next", 1) as after:
        metrics.count(batch(("a", 8, 1.0)))
    assert after.logs["eval_a_tokens"] == 8
    assert tokens(metrics.close(1)) == {"a": 1}


def test_a_generator_that_leaves_an_evaluation_open() -> None:
    metrics = new()

    def batches() -> Generator[int]:
        with metrics.evaluation("inner", 1):
            yield 1

    with metrics.evaluation("outer", 1) as outer:
        metrics.count(batch(("a", 1, 1.0)))
        left = batches()
        next(left)
    assert outer.logs["eval_a_tokens"] == 1 and not metrics.evaluating
    with metrics.evaluation("next", 2) as after:
        left.close()
        metrics.count(batch(("a", 2, 1.0)))
    assert after.logs["eval_a_tokens"] == 2


def test_a_discarded_evaluation() -> None:
    seen = Seen()
    metrics = new(on_window=[seen])
    with metrics.evaluation("warm-up", 0) as evaluation:
        metrics.count(batch(("a", 2, 1.0)))
        evaluation.discard()
    assert evaluation.window is None and evaluation.logs == {} and seen == []


def test_eval_channels() -> None:
    metrics = new("a", "b", eval_channels=("b", "unlabeled"))
    with metrics.evaluation("test", 1) as evaluation:
        metrics.count(batch(("a", 2, 1.0), ("b", 3, 1.0), (None, 4, 1.0)))
    assert evaluation.window is not None
    assert tokens(evaluation.window) == {"b": 3, "unlabeled": 4}
    # The sums are there all the same.
    assert evaluation.window.sums("a")["tokens"] == 2
    metrics.count(batch(("a", 2, 1.0)))
    assert tokens(metrics.close(1)) == {"a": 2}


@pytest.mark.parametrize("unknown", ["error", "unlabeled"])
def test_eval_channels_that_can_be_known_to_be_wrong(unknown: str) -> None:
    with pytest.raises(
        ConfigError, match="eval_channels names 'bb', which is no channel; did you mean 'bbu'"
    ):
        new("bbu", "rru", eval_channels=("bb",), unknown=unknown)
    assert new("bbu", eval_channels=("bbu", "unlabeled"), unknown=unknown)


def test_eval_channels_that_turn_out_wrong(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(eval_channels=("bb", "zzz"))
    for step in (1, 2):
        with metrics.evaluation("test", step) as evaluation:
            metrics.count(batch(("bbu", 2, 1.0)))
        assert evaluation.logs == {}
    assert [record.getMessage() for record in caplog.records] == [
        "eval_channels names 'bb', which is no channel; did you mean 'bbu'?",
        "eval_channels names 'zzz', which is no channel; known are bbu.",
    ]
    with pytest.raises(ConfigError, match="eval_channels names 'bb'"):
        metrics.check_eval_channels()


def test_a_metric_of_every_channel_ignores_eval_channels() -> None:
    schema = Schema("pairs", count="pairs")
    schema.register(
        Column("pairs", "pairs", ""),
        Column("margin", "reward", ""),
        Metric(
            "mean",
            ("margin", "pairs"),
            lambda s: ratio(s["margin"], s["pairs"]),
            asked_by=("loss",),
        ),
        Metric(
            "own",
            ("pairs",),
            lambda s: s["pairs"],
            always=True,
            every_channel=True,
            key="own_{channel}",
        ),
    )
    metrics = new("a", "b", eval_channels=("a",), schema=schema)
    with metrics.evaluation("test", 1) as evaluation:
        metrics.add(["a", "b"], {"pairs": torch.ones(2), "margin": torch.tensor([2.0, 3.0])})
    assert evaluation.logs == {"eval_a_mean": 2.0, "eval_own_a": 1.0, "eval_own_b": 1.0}


def test_an_evaluation_on_the_training_data_is_no_training() -> None:
    """Trainers name the split by its prefix, and `train` is a usual one."""
    told: list[Window] = []
    metrics = ChannelMetrics(
        MetricsConfig(metrics=("tokens", "tokens_total")), on_window=[told.append]
    )
    batch = MicroBatch(token_losses=torch.ones(4), channels=["a"])
    metrics.count(batch)
    assert metrics.close(1).logs == {"a_tokens": 4, "a_tokens_total": 4}
    with metrics.evaluation("train", 1, "train_") as found:
        metrics.count(batch)
    assert found.logs == {"train_a_tokens": 4}
    assert [window.split for window in told] == ["train", "eval_train"]
    assert metrics.totals.of("a")["tokens_total"] == 4


def test_a_step_of_an_evaluation_that_is_run_again() -> None:
    """It counts once, and the training step around the evaluation stays as it is."""
    metrics = new("a", metrics=("tokens",))
    metrics.begin_step()
    metrics.count(batch(("a", 1, 1.0)))
    with metrics.evaluation("eval", 1) as found:
        for tokens in (2, 3):
            for _ in range(2):
                metrics.begin_step()
                metrics.count(batch(("a", tokens, 1.0)))
            metrics.end_step()
        metrics.begin_step()
        metrics.count(batch(("a", 5, 1.0)))
        metrics.end_step(discard=True)
        metrics.begin_step()
        metrics.count(batch(("a", 7, 1.0)))
    assert found.logs == {"eval_a_tokens": 2 + 3 + 7}
    assert metrics.close(1).logs == {"a_tokens": 1}
