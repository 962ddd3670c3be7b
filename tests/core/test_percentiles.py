"""Percentiles of the mean loss per sequence, from the histogram."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from channel_metrics import ChannelLossAccumulator
from channel_metrics.core.percentiles import BINS

METRICS = ("loss_p10", "loss_p50", "loss_p90")


def accumulated(means: list[float], splits: int = 1) -> ChannelLossAccumulator:
    """One sequence of two tokens per mean."""
    found = ChannelLossAccumulator(["a"], metrics=METRICS)
    for part in (means[i::splits] for i in range(splits)):
        losses = torch.tensor([[0.5 * mean, 1.5 * mean] for mean in part], dtype=torch.float64)
        found.update(losses, channels=["a"] * len(part))
    return found


@pytest.mark.parametrize("splits", [1, 7])
def test_they_are_exact_to_half_a_bin(splits: int) -> None:
    """Also however the sequences are spread over micro-batches."""
    rng = random.Random(1)
    means = [rng.lognormvariate(0.5, 1.0) for _ in range(999)]
    found = accumulated(means, splits).compute()
    for percent in (10, 50, 90):
        exact = sorted(means)[math.ceil(percent / 100 * len(means)) - 1]
        assert abs(math.log2(found[f"a_loss_p{percent}"] / exact)) <= 1 / 16
    assert found["a_loss_p10"] < found["a_loss_p50"] < found["a_loss_p90"]


def test_packs_have_those_of_padded_rows() -> None:
    """Sequences of one to four tokens, in one flattened row."""
    lengths = [1 + number % 4 for number in range(40)]
    rng = random.Random(2)
    rows = [[rng.lognormvariate(0.5, 1.0) for _ in range(length)] for length in lengths]
    padded = torch.zeros(40, 4, dtype=torch.float64)
    mask = torch.zeros(40, 4)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    channels = ["a", "b"] * 20
    found = ChannelLossAccumulator(["a", "b"], metrics=METRICS).update(
        torch.tensor([loss for row in rows for loss in row], dtype=torch.float64),
        channels=channels,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]),
    )
    wanted = ChannelLossAccumulator(["a", "b"], metrics=METRICS).update(
        padded, channels=channels, loss_mask=mask
    )
    assert found.compute() == wanted.compute() and len(found.compute()) == 6


def test_the_ends_are_those_of_the_histogram() -> None:
    assert set(accumulated([0.0, 1e-9]).compute().values()) == {2.0**-10}
    assert set(accumulated([32.0, 1e6]).compute().values()) == {2.0**5}


def test_one_sequence_is_all_of_them() -> None:
    values = set(accumulated([3.0]).compute().values())
    assert len(values) == 1 and values.pop() == pytest.approx(3.0, rel=0.045)


def test_parts_of_sequences_have_none() -> None:
    accumulator = accumulated([1.0, 2.0])
    accumulator.update(torch.ones(1, 4), channels=torch.zeros(1, 4, dtype=torch.int64))
    assert accumulator.in_parts and accumulator.compute() == {}


def test_without_float64_there_are_none() -> None:
    accumulator = ChannelLossAccumulator(
        ["a"], metrics=("loss", "loss_p50"), dtype=torch.float32
    ).update(torch.ones(1, 2), channels=["a"])
    assert accumulator.compute() == {"a_loss": 1.0}


def test_the_bins_are_columns_only_if_they_are_asked_for() -> None:
    assert not set(BINS) & set(ChannelLossAccumulator(["a"]).columns)
    counts = accumulated([1.0, 2.0, 2.0]).sums()[1]
    columns = accumulated([1.0]).columns
    of_bins = {name: float(counts[columns.index(name)]) for name in BINS}
    assert sorted(count for count in of_bins.values() if count) == [1.0, 2.0]
