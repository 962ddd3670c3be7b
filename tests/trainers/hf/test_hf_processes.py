"""Many real processes: the numbers are those of one process on the same data; nobody hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from hf_case_tools import (
    MapStyle,
    channel_values,
    check_bits,
    check_windows,
    counted_collectives,
    ddp,
    ddp4,
    run,
    run_for_bits,
    told,
)
from hf_tools import expected_metrics, make_records, tiny_model, token_table
from rank_cases import Case, RanksOf

from channel_metrics import ChannelLossAccumulator, sync

RECORDS = make_records(64)


@pytest.fixture(scope="module")
def table() -> dict[tuple[int, ...], Any]:
    held_out = [make_records(size, seed=size) for size in (3, 10, 17)]
    records = [*RECORDS, *(r for part in held_out for r in part)]
    return token_table(tiny_model(attention_dropout=0.0), records)


def step_losses(ranks: list[Any], table: Any, step: int, accumulation: int) -> list[list[float]]:
    """The nll of each token, by rank, of one step."""
    batches = slice(step * accumulation, (step + 1) * accumulation)
    return [
        [
            nll
            for batch in rank["batches"][batches]
            for ids in batch
            for nll, _ in table[tuple(ids)][1]
        ]
        for rank in ranks
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@ddp
def average_on(folder: Path) -> Any:
    return told(run(folder, records=make_records(64), gradient_accumulation_steps=2))


@ddp
def average_off(folder: Path) -> Any:
    arguments: dict[str, Any] = {
        "average_tokens_across_devices": False,
        "gradient_accumulation_steps": 2,
    }
    return told(run(folder, records=make_records(64), **arguments))


@pytest.mark.parametrize("case", [average_on, average_off])
def test_two_ranks_equal_one_process(ranks_of: RanksOf, table: Any, case: Case) -> None:
    ranks = ranks_of(case)
    check_windows(ranks, table, steps=2, accumulation=2)
    # What the trainer reports: over all tokens of a step, or the mean of the means of the ranks.
    logged = [entry["loss"] for entry in ranks[0]["logs"] if "loss" in entry]
    for window, loss in enumerate(logged):
        by_step = [step_losses(ranks, table, 2 * window + step, 2) for step in (0, 1)]
        if case is average_on:
            expected = mean([mean([nll for rank in step for nll in rank]) for step in by_step])
        else:
            expected = mean([mean([mean(rank) for rank in step]) for step in by_step])
        assert loss == pytest.approx(expected, rel=1e-5)


@ddp4
def four_ranks(folder: Path) -> Any:
    trainer = run(folder, records=make_records(64))
    sizes = {size: trainer.evaluate(_held_out(size)) for size in (3, 10, 17)}
    return told(trainer, evaluated=sizes)


def _held_out(size: int) -> Dataset:
    return Dataset.from_list(make_records(size, seed=size))


def test_four_ranks_equal_one_process(ranks_of: RanksOf, table: Any) -> None:
    ranks = ranks_of(four_ranks)
    assert len(ranks) == 4
    check_windows(ranks, table, steps=2, accumulation=1)
    for size in (3, 10, 17):
        held_out = [[r["input_ids"] for r in make_records(size, seed=size)]]
        expected = expected_metrics(table, held_out, prefix="eval_")
        for rank in ranks:
            found = channel_values(rank["evaluated"][size], "eval_")
            assert found == pytest.approx(expected, rel=1e-5)


@ddp
def bits_off(folder: Path) -> Any:
    return run_for_bits(folder, False)


@ddp
def bits_on(folder: Path) -> Any:
    return run_for_bits(folder, True)


def test_training_is_bit_identical(ranks_of: RanksOf) -> None:
    check_bits(ranks_of(bits_off), ranks_of(bits_on))


# Per step: the channels of the batches of rank 0 and of rank 1.
PLAN = [
    ("bbu", "rru"),
    ("bbu", "bbu"),
    ("rru", "bbu"),
    ("bbu", "late"),
    ("bbu", "rru"),
    ("late", "rru"),
]


@ddp
def tables(folder: Path) -> Any:
    """Ranks meet names on the way, each its own; windows of one step."""
    channels = [channel for step in PLAN for channel in step for _ in range(4)]
    records = [
        {**record, "channel": channel}
        for record, channel in zip(make_records(len(channels)), channels, strict=True)
    ]
    with counted_collectives() as windows:
        trainer = run(
            folder,
            records=MapStyle(records),
            max_steps=len(PLAN),
            logging_steps=1,
            train_sampling_strategy="sequential",
        )
    table = list(trainer.channel_metrics.labels.names)
    return told(trainer, windows=windows, table=table)


def test_ranks_meet_names_on_the_way(ranks_of: RanksOf) -> None:
    """A channel of one rank, of no rank in a window, and one that appears late."""
    ranks = ranks_of(tables)
    names = [
        {k.removesuffix("_loss") for k in e if k.endswith("_loss")} - {"train"}
        for e in ranks[0]["logs"]
    ]
    assert names[:6] == [
        {"bbu", "rru"},
        {"bbu"},
        {"rru", "bbu"},
        {"bbu", "late"},
        {"bbu", "rru"},
        {"late", "rru"},
    ]
    assert ranks[0]["table"] == ["bbu", "rru", "late"]
    assert ranks[1]["table"] == ["rru", "bbu", "late"]
    for first, second in zip(ranks[0]["logs"][:6], ranks[1]["logs"][:6], strict=True):
        assert first == second


def test_one_all_reduce_per_window(ranks_of: RanksOf) -> None:
    """Names that not all ranks have met cost three more, once; the last is that of the end."""
    new = ["all_reduce"] * 4
    steady = ["all_reduce"]
    for rank in ranks_of(tables):
        assert rank["windows"] == [new, steady, steady, new, steady, steady, steady]


@ddp
def nothing_supervised(folder: Path) -> Any:
    """Rank 1 never has a token that is supervised."""
    records = make_records(32)
    for index, record in enumerate(records):
        if index // 4 % 2 == 1:
            record["labels"] = [-100] * len(record["labels"])
    return told(run(folder, records=records, train_sampling_strategy="sequential"))


def test_a_rank_with_nothing_supervised(ranks_of: RanksOf, table: Any) -> None:
    ranks = ranks_of(nothing_supervised)
    for rank in ranks:
        first = channel_values(rank["logs"][0])
        seen = ranks[0]["batches"][:2]
        assert first == pytest.approx(expected_metrics(table, seen), rel=1e-5)


@ddp
def no_batch(folder: Path) -> Any:
    """Rank 1 has no batch at all, and does not even know a channel."""
    window = ChannelLossAccumulator()
    if dist.get_rank() == 0:
        window.update(torch.tensor([[1.0, 3.0]]), channels=["bbu"])
    return [sync(window).compute(), sync(window).compute()]


def test_a_rank_without_a_batch_takes_part(ranks_of: RanksOf) -> None:
    expected = {"bbu_loss": 2.0, "bbu_tokens": 2.0, "bbu_share": 1.0}
    assert ranks_of(no_batch) == [[expected] * 2] * 2
