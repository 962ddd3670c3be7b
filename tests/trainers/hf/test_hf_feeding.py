"""How batches come to two ranks: no record is lost on any way, or the way is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_case_tools import (
    COUNTS,
    DISPATCH,
    NO_DISPATCH,
    SPLIT,
    Stream,
    ddp,
    fixed_records,
    run,
    told,
    weights_hash,
)
from hf_tools import PaddingCollator, Record, make_records, train
from rank_cases import Case, RanksOf
from transformers import DataCollatorWithFlattening, TrainingArguments

from channel_metrics import ConfigError, MetricsConfig
from channel_metrics.trainers.hf import attach


def counted(records: list[Record]) -> dict[str, int]:
    """{channel: supervised targets} by counting."""
    totals: dict[str, int] = {}
    for record in records:
        supervised = sum(label != -100 for label in record["labels"][1:])
        totals[record["channel"]] = totals.get(record["channel"], 0) + supervised
    return totals


def logged(entries: list[dict[str, float]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for entry in entries:
        for key, value in entry.items():
            if key.endswith("_tokens") and not key.startswith("eval_"):
                name = key.removesuffix("_tokens")
                totals[name] = totals.get(name, 0) + int(value)
    return totals


def _fed(folder: Path, make: Any, accelerator: Any = None, **more: Any) -> Any:
    """One epoch of 32 records of one width."""
    return told(
        run(
            folder,
            config=more.pop("config", COUNTS),
            records=make(fixed_records(32)),
            accelerator_config=accelerator or {},
            **{"max_steps": 4, "logging_steps": 4} | more,
        )
    )


@ddp
def feed_dispatch(folder: Path) -> Any:
    return _fed(folder, Dataset.from_list, DISPATCH)


@ddp
def feed_split(folder: Path) -> Any:
    return _fed(folder, Dataset.from_list, SPLIT, max_steps=8)


@ddp
def feed_stream(folder: Path) -> Any:
    return _fed(folder, Stream)


@ddp
def feed_stream_by_all(folder: Path) -> Any:
    """Each rank reads the stream itself; the table is open."""
    config = MetricsConfig(metrics=COUNTS.metrics)
    return _fed(folder, Stream, NO_DISPATCH, config=config)


@ddp
def feed_stream_workers(folder: Path) -> Any:
    return _fed(folder, Stream, NO_DISPATCH, dataloader_num_workers=2)


@ddp
def feed_arrow_stream(folder: Path) -> Any:
    def make(records: list[Any]) -> Any:
        return Dataset.from_list(records).to_iterable_dataset(num_shards=4)

    return _fed(folder, make, NO_DISPATCH, dataloader_num_workers=2)


@ddp
def feed_by_length(folder: Path) -> Any:
    by_length: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if not hasattr(TrainingArguments, "train_sampling_strategy"):
        by_length = {"group_by_length": True}
    return _fed(folder, Dataset.from_list, **by_length)


@ddp
def feed_persistent(folder: Path) -> Any:
    """Two epochs, with workers that stay."""
    arguments = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    return _fed(folder, Dataset.from_list, max_steps=8, logging_steps=8, **arguments)


@pytest.mark.parametrize(
    ("case", "epochs"),
    [
        (feed_dispatch, 1),
        (feed_split, 1),
        (feed_stream, 1),
        (feed_stream_by_all, 1),
        (feed_stream_workers, 1),
        (feed_arrow_stream, 1),
        (feed_by_length, 1),
        (feed_persistent, 2),
    ],
)
def test_no_record_is_lost_on_the_way_to_two_ranks(
    ranks_of: RanksOf, case: Case, epochs: int
) -> None:
    expected = {name: epochs * count for name, count in counted(fixed_records(32)).items()}
    for rank in ranks_of(case):
        assert rank["processes"] == 2
        assert logged(rank["logs"]) == expected
        samples = sum(v for e in rank["logs"] for k, v in e.items() if k.endswith("_samples"))
        assert samples == 32 * epochs


@pytest.mark.parametrize("collator", [PaddingCollator, DataCollatorWithFlattening])
@pytest.mark.parametrize("config", [MetricsConfig(), COUNTS])
def test_a_stream_on_one_process(tmp_path: Path, collator: Any, config: MetricsConfig) -> None:
    """accelerate would cut boundaries as if they were rows, and older ones refuse names."""
    records = make_records(64)
    runs = [
        train(
            tmp_path,
            prepare=prepare,
            records=Stream(records),
            max_steps=16,
            logging_steps=16,
            trainer_arguments={"data_collator": collator()},
        )
        for prepare in (None, lambda trainer: attach(trainer, config))
    ]
    assert logged(runs[1].state.log_history) == counted(records)
    assert weights_hash(runs[0].model) == weights_hash(runs[1].model)
    assert runs[1].accelerator.dispatch_batches is runs[0].accelerator.dispatch_batches


def _refused(folder: Path, **arguments: Any) -> str:
    try:
        run(folder, **arguments)
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


@ddp
def refuse_open_stream(folder: Path) -> Any:
    return _refused(folder, records=Stream(fixed_records(16)))


def test_open_tables_cannot_be_sent(ranks_of: RanksOf) -> None:
    """Both ranks say so, before there is a batch."""
    expected = (
        "one process sends the batches of a stream to the others (dispatch_batches), so "
        "channels must be ids, but the train set cannot be scanned for names (Stream); set "
        'accelerator_config={"dispatch_batches": False}, or, if all batches are padded to one '
        "length (accelerate asks for that), declare `channels` in the metrics config."
    )
    assert ranks_of(refuse_open_stream) == [expected] * 2


@ddp
def refuse_flattened(folder: Path) -> Any:
    collator = DataCollatorWithFlattening()
    return _refused(
        folder, records=make_records(16), accelerator_config=DISPATCH, collator=collator
    )


def test_flattened_batches_cannot_be_sent(ranks_of: RanksOf) -> None:
    for message in ranks_of(refuse_flattened):
        assert "a batch of DataCollatorWithFlattening holds several sequences" in message
        assert 'set accelerator_config={"dispatch_batches": False}' in message
