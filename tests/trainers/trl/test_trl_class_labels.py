"""A `ClassLabel` column gives its names in TRL's adapters, too."""

from __future__ import annotations

from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Value

from channel_metrics.core.labels import LabelTable
from channel_metrics.data.scan import class_names
from channel_metrics.trainers.trl.collator import RecordCollator
from channel_metrics.trainers.trl.packing import _indices

FEATURES = Features({"channel": ClassLabel(names=["web", "code"]), "text": Value("string")})
RECORDS = Dataset.from_dict({"channel": [1, 0, 1], "text": ["a", "b", "c"]}, features=FEATURES)
CLASSES = class_names(RECORDS, ("channel",))


def collate(records: list[Any]) -> dict[str, Any]:
    return {"input_ids": torch.ones(len(records), 2)}


def test_pairs_and_packs_have_the_names_of_the_classes() -> None:
    table = LabelTable(["code", "web"])
    collator = RecordCollator(collate, fields=("channel",), table=table, classes=CLASSES)
    assert collator(list(RECORDS))["channels"].tolist() == [0, 1, 0]
    found = _indices(list(RECORDS), ("channel",), table.names, "unlabeled", CLASSES)
    assert found == [0, 1, 0]
