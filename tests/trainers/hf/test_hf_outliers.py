"""Outliers of the real Trainer: record ids through its columns, nothing changed in the training."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_tools import make_records, tiny_model, train
from torch.utils.data import default_collate
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, TrainingArguments

from channel_metrics import ChannelError, ChannelMetrics, MetricsConfig
from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.trainers.hf import attach

STRATEGY: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in {one.name for one in fields(TrainingArguments)}
    else {"group_by_length": True}
)
COLLATORS: dict[str, Any] = {
    "padded": lambda: DataCollatorForSeq2Seq(byte_tokenizer()),
    "flattened": DataCollatorWithFlattening,
}


def run(folder: Path, collator: str, *, on: bool, **arguments: Any) -> Any:
    # transformers' own collators take no strings, so the other run has no ids.
    records = [{**r, **({"id": f"r{n}"} if on else {})} for n, r in enumerate(make_records(64))]
    outliers = {"folder": str(folder / "outliers"), "count": 2}
    config = MetricsConfig(outliers=outliers if on else {})
    return train(
        folder,
        records=records,
        prepare=lambda trainer: attach(trainer, config),
        model=tiny_model(vocab_size=260),
        trainer_arguments={
            "data_collator": COLLATORS[collator](),
            "processing_class": byte_tokenizer(),
        },
        **arguments,
    )


@pytest.mark.parametrize("collator", ["padded", "flattened"])
@pytest.mark.parametrize("removes", [True, False])
def test_ids_and_texts_are_those_of_the_records(
    tmp_path: Path, collator: str, removes: bool
) -> None:
    trainer = run(tmp_path / "on", collator, on=True, remove_unused_columns=removes)
    path = tmp_path / "on" / "outliers" / "rank0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    records = {f"r{n}": record for n, record in enumerate(make_records(64))}
    tokenizer = byte_tokenizer()
    assert {line["step"] for line in lines} == {2, 4}
    for line in lines:
        record = records[line["id"]]
        supervised = [token for token in record["labels"] if token != -100]
        assert line["channel"] == record["channel"]
        assert (line["tokens"], line["text"]) == (len(supervised), tokenizer.decode(supervised))
        own = [v for v in lines if (v["step"], v["channel"]) == (line["step"], line["channel"])]
        assert max(v["loss"] for v in own if v["outlier"] == "highest") >= line["loss"]
    off = run(tmp_path / "off", collator, on=False, remove_unused_columns=removes)
    for mine, theirs in zip(trainer.model.parameters(), off.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), "the training is not changed"
    assert not (tmp_path / "off" / "outliers").exists()


@pytest.mark.parametrize("removes", [True, False])
def test_ids_are_the_places_in_the_dataset(tmp_path: Path, removes: bool) -> None:
    records = make_records(64)

    def run(folder: Path, outliers: dict[str, Any]) -> Any:
        config = MetricsConfig(outliers=outliers)
        return train(
            folder,
            records=records,
            prepare=lambda trainer: attach(trainer, config),
            trainer_arguments={
                "data_collator": DataCollatorForSeq2Seq(byte_tokenizer()),
                "eval_dataset": Dataset.from_list(make_records(9, seed=5)),
            },
            model=tiny_model(vocab_size=260),
            remove_unused_columns=removes,
            eval_strategy="steps",
            eval_steps=4,
        )

    on = run(tmp_path, {"folder": str(tmp_path), "count": 2, "id_field": "@index"})
    lines = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "eval"}
    for line in lines:
        record = (make_records(9, seed=5) if line["split"] == "eval" else records)[int(line["id"])]
        assert line["channel"] == record["channel"]
        assert line["tokens"] == sum(token != -100 for token in record["labels"])
    off = run(tmp_path / "off", {})
    for mine, theirs in zip(on.model.parameters(), off.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), "the training is not changed"


def test_batches_by_length_are_those_without_an_index(tmp_path: Path) -> None:
    """transformers reads the lengths in a column of the dataset itself."""

    def batches(folder: Path, outliers: dict[str, Any]) -> list[list[int]]:
        seen: list[list[int]] = []
        padded = DataCollatorForSeq2Seq(byte_tokenizer())

        def collate(features: list[Any]) -> Any:
            seen.append([feature.pop("length") for feature in features])
            kept = [{key: f[key] for key in ("input_ids", "labels")} for f in features]
            return padded(kept)

        train(
            folder,
            records=[{**r, "length": n * 5 % 11} for n, r in enumerate(make_records(32))],
            prepare=lambda trainer: attach(trainer, MetricsConfig(outliers=outliers)),
            trainer_arguments={"data_collator": collate},
            model=tiny_model(vocab_size=260),
            remove_unused_columns=False,
            **STRATEGY,
        )
        return seen

    on = batches(tmp_path / "on", {"folder": str(tmp_path), "id_field": "@index"})
    assert on == batches(tmp_path / "off", {})


def test_a_dataset_whose_index_is_not_known_is_an_error(tmp_path: Path) -> None:
    config = MetricsConfig(outliers={"folder": str(tmp_path), "id_field": "@index"})
    metrics = ChannelMetrics(config)
    batch = metrics.collator(default_collate)([{"channel": "bbu", "labels": torch.ones(2)}])
    with pytest.raises(ChannelError, match="but a record has only channel, labels: the Trainer"):
        raise batch["channels"].error
