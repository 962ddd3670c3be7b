"""Error bars: coverage by simulation, and windows that must not have any."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from no_sync import NoSync

from channel_metrics import ChannelLossAccumulator, ChannelMetrics, MetricsConfig, MicroBatch
from channel_metrics.core.schema import TOKENS
from channel_metrics.core.text_sizes import TextSizes

BARS = tuple(f"{mean}_{end}" for mean in ("loss", "token_acc") for end in ("se", "low", "high"))
NUM_WINDOWS, NUM_SEQUENCES = 3_000, 25


def simulated() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, correctness and bounds of sequences whose tokens resemble each other, and the
    number of the window of each sequence. True means: loss 2, accuracy 0.6."""
    torch.manual_seed(7)
    num = NUM_WINDOWS * NUM_SEQUENCES
    lengths = torch.randint(1, 40, (num,))
    hardness = torch.rand(num)
    of_token = hardness.repeat_interleave(lengths)
    losses = 1 + of_token + torch.rand(len(of_token))
    correct = torch.rand(len(of_token)) < 0.3 + 0.6 * of_token
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return losses, correct, bounds, torch.arange(num) % NUM_WINDOWS


def test_intervals_hold_the_true_mean_in_95_of_100_windows() -> None:
    """Each channel is one window. Intervals that took tokens for draws would hold it in half."""
    losses, correct, bounds, windows = simulated()
    table = [f"w{i}" for i in range(NUM_WINDOWS)]
    accumulator = ChannelLossAccumulator(table, metrics=(*BARS, "tokens"))
    accumulator.update(losses, channels=windows, cu_seqlens=bounds, correct=correct)
    found = list(accumulator.compute_by_channel().values())
    assert len(found) == NUM_WINDOWS
    for mean, truth in (("loss", 2.0), ("token_acc", 0.6)):
        held = [values[f"{mean}_low"] <= truth <= values[f"{mean}_high"] for values in found]
        assert 0.93 < sum(held) / NUM_WINDOWS < 0.97
    of_tokens = [0.41 * 1.96 / math.sqrt(values["tokens"]) for values in found]
    middle = [(values["loss_low"] + values["loss_high"]) / 2 for values in found]
    held = [abs(m - 2.0) < half for m, half in zip(middle, of_tokens, strict=True)]
    assert sum(held) / NUM_WINDOWS < 0.7


def test_off_is_free() -> None:
    config = MetricsConfig(metrics=("loss", "token_acc", "ppl"))
    session = ChannelMetrics(config)
    plain = [column.name for column in TOKENS.columns if not column.optional]
    assert session.close(1).columns == tuple(plain)
    assert ChannelLossAccumulator(["a"]).columns == tuple(plain)
    some = ChannelMetrics(MetricsConfig(metrics=("loss_low",))).close(1).columns
    assert {name for name in some if name not in plain} == {
        "loss_sequences", "loss_n", "loss_n_squared", "loss_y_squared", "loss_y_times_n",
    }  # fmt: skip


def batch(session: ChannelMetrics, **given: Any) -> MicroBatch:
    ids = torch.tensor(session.labels.ids(["a", "a"]))
    losses = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    return MicroBatch(**{"token_losses": losses, "channels": ids, **given})


def test_only_the_config_decides_what_is_measured() -> None:
    assert ChannelMetrics(MetricsConfig(metrics=("token_acc_se",))).with_correct
    assert not ChannelMetrics(MetricsConfig(metrics=("loss", "loss_se"))).with_correct


def test_evaluations_and_open_windows_have_them() -> None:
    session = ChannelMetrics(MetricsConfig(metrics=("loss", "loss_se", "tokens")))
    session.count(batch(session))
    assert session.peek(1).logs == {"a_loss": 2.75, "a_loss_se": pytest.approx(1.25)}
    with session.evaluation("eval", 1) as found:
        session.count(batch(session))
    assert found.logs["eval_a_loss_se"] == pytest.approx(1.25)


@pytest.mark.parametrize("whole_first", [True, False])
def test_parts_of_sequences_have_none(whole_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Also a window that has whole sequences, too: their squares do not speak for the rest."""
    session = ChannelMetrics(MetricsConfig(metrics=("loss", *BARS)))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            if whole_first:
                session.count(batch(session))
            session.count(batch(session, channels=torch.zeros(2, 2, dtype=torch.int64)))
    assert session.close(1).logs == {"a_loss": 2.75}
    (said,) = [record.getMessage() for record in caplog.records]
    assert "loss_se" in said and "whole sequences" in said
    session.count(batch(session))
    assert "a_loss_se" in session.close(2).logs


def test_without_float64_there_are_none() -> None:
    accumulator = ChannelLossAccumulator(["a"], metrics=("loss", *BARS), dtype=torch.float32)
    accumulator.update(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), channels=["a", "a"])
    assert accumulator.in_parts and accumulator.compute() == {"a_loss": 2.75}


def test_what_came_in_parts_is_not_forgotten() -> None:
    accumulator = ChannelLossAccumulator(["a"], metrics=("loss", *BARS))
    for channels in (torch.zeros(2, dtype=torch.int64), ["a"]):
        accumulator.update(torch.ones(2), channels=channels)
        assert accumulator.in_parts


def test_one_sequence_has_none_and_no_width_is_no_certainty() -> None:
    accumulator = ChannelLossAccumulator(["a", "b"], metrics=BARS)
    correct = torch.tensor([[True, True]] * 4)
    losses = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 1.0], [2.0, 2.0]])
    accumulator.update(losses, channels=["a", "b", "b", "b"], correct=correct)
    values = accumulator.compute_by_channel()
    assert values["a"] == {}
    assert "token_acc_se" not in values["b"] and values["b"]["token_acc_high"] == 1
    assert values["b"]["token_acc_low"] == pytest.approx(0.025 ** (1 / 3))


def test_nothing_waits_for_the_device() -> None:
    accumulator = ChannelLossAccumulator(["a", "b"], device="meta", metrics=TOKENS.window_metrics)
    accumulator.text_sizes = TextSizes(*torch.zeros(2, 9, dtype=torch.int64, device="meta"))
    with NoSync():
        accumulator.update(
            torch.zeros(8, device="meta"),
            channels=torch.zeros(2, dtype=torch.int64, device="meta"),
            cu_seqlens=torch.zeros(3, dtype=torch.int32, device="meta"),
            labels=torch.zeros(8, dtype=torch.int64, device="meta"),
            correct=torch.zeros(8, dtype=torch.bool, device="meta"),
        )
