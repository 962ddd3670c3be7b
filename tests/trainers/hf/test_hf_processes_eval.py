"""Uneven last batches on two ranks: training counts repetitions, evaluation each record once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_case_tools import (
    COUNTS,
    DISPATCH,
    NO_DISPATCH,
    SPLIT,
    Stream,
    channel_values,
    ddp,
    fixed_records,
    run,
    told,
)
from hf_tools import PaddingCollator, expected_metrics, make_records, tiny_model, token_table
from rank_cases import Case, RanksOf
from transformers import DataCollatorWithFlattening

EVAL_SIZES = (3, 8, 9, 10, 13)


@ddp
def uneven_training(folder: Path) -> Any:
    """Ten records in batches of four on two ranks: sixteen are trained."""
    arguments: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 1, "logging_steps": 1}
    return told(run(folder, config=COUNTS, records=make_records(10), **arguments))


def test_training_counts_the_repetitions_it_trains_on(ranks_of: RanksOf) -> None:
    """Ten records in batches of four on two ranks: two steps, sixteen rows trained."""
    ranks = ranks_of(uneven_training)
    seen = [ids for rank in ranks for batch in rank["batches"] for ids in batch]
    assert len(seen) == 16 and len({json.dumps(ids) for ids in seen}) == 10
    table = token_table(tiny_model(), make_records(10))
    tokens = sum(len(table[tuple(ids)][1]) for ids in seen)
    found = sum(v for e in ranks[0]["logs"] for k, v in e.items() if k.endswith("_tokens"))
    assert found == tokens
    samples = sum(v for e in ranks[0]["logs"] for k, v in e.items() if k.endswith("_samples"))
    assert samples == len(seen)


def _evaluated(folder: Path, make: Any, accelerator: Any = None, **more: Any) -> Any:
    trainer = run(
        folder,
        config=COUNTS,
        records=fixed_records(8),
        max_steps=1,
        accelerator_config=accelerator or {},
        **more,
    )
    results: dict[int, dict[str, Any]] = {}
    for size in EVAL_SIZES:
        try:
            results[size] = trainer.evaluate(make(fixed_records(size, seed=size)))
        except RuntimeError as error:
            results[size] = {"error": str(error)}
    return told(trainer, evaluated=results)


@ddp
def eval_map(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list)


@ddp
def eval_split(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list, SPLIT)


@ddp
def eval_dispatch(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list, DISPATCH)


@ddp
def eval_dispatch_split(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list, DISPATCH | SPLIT)


@ddp
def eval_stream(folder: Path) -> Any:
    return _evaluated(folder, Stream)


@ddp
def eval_flattened(folder: Path) -> Any:
    """Without padding, the rows of a rank are one, and its records are sequences."""
    collator = DataCollatorWithFlattening()
    return _evaluated(folder, Dataset.from_list, collator=collator)


class Sorting:
    """A collator that changes the order of its records: the repeated ones are not the last."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __call__(self, features: list[Any]) -> Any:
        return self.base(sorted(features, key=lambda feature: feature["input_ids"]))


@ddp
def eval_sorted(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list, collator=Sorting(PaddingCollator()))


@ddp
def eval_sorted_flattened(folder: Path) -> Any:
    collator = Sorting(DataCollatorWithFlattening())
    return _evaluated(folder, Dataset.from_list, collator=collator)


@ddp
def eval_sorted_dispatch(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list, DISPATCH, collator=Sorting(PaddingCollator()))


@pytest.mark.parametrize("size", EVAL_SIZES)
@pytest.mark.parametrize(
    "case",
    [
        eval_map,
        eval_split,
        eval_dispatch,
        eval_dispatch_split,
        eval_stream,
        eval_flattened,
        eval_sorted,
        eval_sorted_flattened,
        eval_sorted_dispatch,
    ],
)
def test_evaluation_counts_each_record_once(ranks_of: RanksOf, case: Case, size: int) -> None:
    records = fixed_records(size, seed=size)
    table = token_table(tiny_model(attention_dropout=0.0), records)
    expected = expected_metrics(table, [[r["input_ids"] for r in records]], prefix="eval_")
    for rank in ranks_of(case):
        found = channel_values(rank["evaluated"][size], "eval_")
        samples = {key: found.pop(key) for key in list(found) if key.endswith("_samples")}
        assert sum(samples.values()) == size
        assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-5)
        assert not rank["warned"]


class PairCollator(PaddingCollator):
    """Each row is two sequences, told by position ids that start again."""

    def __call__(self, features: list[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        half = batch["input_ids"].shape[1] // 2
        batch["position_ids"] = torch.arange(half).repeat(len(features), 2)
        batch["labels"][:, [0, half]] = -100
        del batch["attention_mask"]
        return batch


@ddp
def eval_packed(folder: Path) -> Any:
    """Rows of two sequences each, whose channels differ."""

    def pairs(records: list[Any]) -> Dataset:
        return Dataset.from_list([{**r, "channel": [r["channel"], "bbu"]} for r in records])

    trainer = run(
        folder,
        config=COUNTS,
        records=pairs(fixed_records(8)),
        max_steps=1,
        collator=PairCollator(),
        trainer_arguments={},
    )
    sizes = {size: trainer.evaluate(pairs(fixed_records(size, seed=size))) for size in EVAL_SIZES}
    return told(trainer, evaluated=sizes)


@pytest.mark.parametrize("size", EVAL_SIZES)
def test_packed_rows_are_told_by_rows(ranks_of: RanksOf, size: int) -> None:
    """Each record is two sequences: counting sequences would cut the evaluation short."""
    counted: dict[str, int] = {}
    for record in fixed_records(size, seed=size):
        for name, labels in (
            (record["channel"], record["labels"][1:8]),
            ("bbu", record["labels"][9:]),
        ):
            supervised = sum(label != -100 for label in labels)
            if supervised:
                counted[name] = counted.get(name, 0) + supervised
    for rank in ranks_of(eval_packed):
        entry = rank["evaluated"][size]
        found = {
            key.removeprefix("eval_").removesuffix("_tokens"): value
            for key, value in channel_values(entry, "eval_").items()
            if key.endswith("_tokens")
        }
        assert found == counted


@ddp
def eval_stream_by_all(folder: Path) -> Any:
    return _evaluated(folder, Stream, NO_DISPATCH)


def test_a_stream_read_by_all_ranks_says_that_it_counts_repetitions(ranks_of: RanksOf) -> None:
    """Eight rows a step: what does not fill the last step is filled, and counted."""
    for rank in ranks_of(eval_stream_by_all):
        assert any("counted twice" in warning for warning in rank["warned"])
        for size, rows in ((3, 8), (8, 8), (9, 16), (10, 16), (13, 16)):
            entry = rank["evaluated"][size]
            assert sum(v for k, v in entry.items() if k.endswith("_samples")) == rows


@ddp
def eval_sets(folder: Path) -> Any:
    """A dict of evaluation sets, in training."""
    sets = {name: Dataset.from_list(make_records(7, seed=s)) for name, s in (("a", 1), ("b", 2))}
    trainer = run(
        folder,
        eval_strategy="steps",
        eval_steps=2,
        trainer_arguments={"eval_dataset": sets},
    )
    return told(trainer)


def test_evaluation_sets_have_their_prefixes(ranks_of: RanksOf) -> None:
    sets = {"a": make_records(7, seed=1), "b": make_records(7, seed=2)}
    for rank in ranks_of(eval_sets):
        for name, records in sets.items():
            own = token_table(tiny_model(attention_dropout=0.0), records)
            prefix = f"eval_{name}_"
            expected = expected_metrics(own, [[r["input_ids"] for r in records]], prefix=prefix)
            entries = [entry for entry in rank["logs"] if f"{prefix}loss" in entry]
            assert len(entries) == 2
            for entry in entries:
                assert channel_values(entry, prefix) == pytest.approx(expected, rel=1e-5)
