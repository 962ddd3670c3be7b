"""Which record is which: collators that sort or replace, class labels, blocks of mixed texts."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from hf_tools import (
    PaddingCollator,
    Record,
    channel_logs,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
    train,
)
from transformers import DataCollatorWithFlattening, default_data_collator

from channel_metrics import ChannelError, MetricsConfig
from channel_metrics.data.scan import class_names, count_channels
from channel_metrics.trainers.hf import attach


class LongestFirst:
    """Sorts its records by length, and remembers them."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.batches: list[list[list[int]]] = []

    def __call__(self, features: list[Record]) -> Any:
        self.batches.append([feature["input_ids"] for feature in features])
        return self.base(sorted(features, key=lambda feature: -len(feature["input_ids"])))


def first_step(folder: Path, records: Any, collator: Any, **options: Any) -> Any:
    """One step in evaluation mode, so that a forward of each record by itself says the same."""
    return train(
        folder,
        model=tiny_model(attention_dropout=0.0),
        records=records,
        max_steps=1,
        logging_steps=1,
        trainer_arguments={"data_collator": collator},
        **options,
    )


@pytest.mark.parametrize(
    "base", [PaddingCollator(), PaddingCollator(left=True), DataCollatorWithFlattening()]
)
def test_channels_follow_records_that_are_sorted(tmp_path: Path, base: Any) -> None:
    records = make_records(32)
    collator = LongestFirst(base)
    trainer = first_step(tmp_path, records, collator, prepare=attach)
    table = token_table(tiny_model(attention_dropout=0.0), records)
    (found,) = channel_logs(trainer)
    assert found == pytest.approx(expected_metrics(table, collator.batches[:1]), rel=1e-5)


def test_records_that_are_replaced_end_the_run(tmp_path: Path) -> None:
    records = make_records(33)

    def replacing(features: list[Record]) -> Any:
        return PaddingCollator()([features[0], *features[:-1]])

    with pytest.raises(ChannelError, match="reorders, drops or replaces records"):
        first_step(tmp_path, records, replacing, prepare=attach)


def test_a_collator_that_returns_channels_itself(tmp_path: Path) -> None:
    """No record names its channel, and each batch is a selection of its records."""
    records = make_records(32)
    names = {tuple(record["input_ids"]): record.pop("channel") for record in records}
    seen: list[list[list[int]]] = []

    def selecting(features: list[Record]) -> Any:
        kept = features[::-2]
        seen.append([feature["input_ids"] for feature in kept])
        channels = [names[tuple(feature["input_ids"])] for feature in kept]
        return {**PaddingCollator()(kept), "channels": channels}

    config = MetricsConfig(channels=tuple(sorted(set(names.values()))))
    trainer = first_step(tmp_path, records, selecting, prepare=lambda t: attach(t, config))
    table = token_table(
        tiny_model(attention_dropout=0.0),
        [{**record, "channel": names[tuple(record["input_ids"])]} for record in records],
    )
    (found,) = channel_logs(trainer)
    assert found == pytest.approx(expected_metrics(table, seen[:1]), rel=1e-5)


def test_class_labels_are_logged_by_name(tmp_path: Path) -> None:
    records = make_records(32, channels=("bbu", "rru"))
    label = ClassLabel(names=["rru", "bbu"])
    numbers = [{**record, "channel": label.str2int(record["channel"])} for record in records]
    dataset = Dataset.from_list(numbers).cast_column("channel", label)
    assert class_names(dataset, ["channel"]) == {"channel": ("rru", "bbu")}
    by_name, by_number = (
        channel_logs(train(tmp_path, records=data, prepare=attach)) for data in (records, dataset)
    )
    assert by_name == by_number and "bbu_loss" in by_name[0]
    lists = Dataset.from_dict({"channel": [[0, 1], [1]]}).cast_column("channel", [label])
    assert count_channels(lists, ["channel"]) == {"rru": 1, "bbu": 2}


BLOCK = 12


def group_texts(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """transformers' examples/pytorch/language-modeling/run_clm.py, word for word."""
    concatenated_examples = {k: list(chain(*examples[k])) for k in examples.keys()}  # noqa: SIM118 - theirs
    total_length = len(concatenated_examples[next(iter(examples.keys()))])
    total_length = (total_length // BLOCK) * BLOCK
    result = {
        k: [t[i : i + BLOCK] for i in range(0, total_length, BLOCK)]
        for k, t in concatenated_examples.items()
    }
    result["labels"] = result["input_ids"].copy()
    return result


def test_blocks_of_mixed_texts(tmp_path: Path) -> None:
    """Each target counts for the text that it comes from; a loop over the blocks says the same."""
    texts = Dataset.from_list(
        [
            {"input_ids": r["input_ids"], "channel": [r["channel"]] * len(r["input_ids"])}
            for r in make_records(64, seed=3)
        ]
    )
    blocks = texts.map(group_texts, batched=True)
    seen: list[Record] = []

    def watching(features: list[Record]) -> Any:
        seen.extend(features)
        return default_data_collator(features)

    trainer = first_step(tmp_path, blocks, watching, prepare=attach)
    model = tiny_model(attention_dropout=0.0).double().eval()
    channels = {tuple(block["input_ids"]): block["channel"] for block in blocks}
    sums: dict[str, list[float]] = {}
    for block in seen[:4]:
        ids = [int(token) for token in block["input_ids"]]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for at, (target, name) in enumerate(zip(ids, channels[tuple(ids)], strict=True)):
            if at:
                entry = sums.setdefault(name, [0.0, 0])
                entry[0] -= log_probs[at - 1, target].item()
                entry[1] += 1
    (found,) = channel_logs(trainer)
    expected = {f"{name}_loss": nll / count for name, (nll, count) in sums.items()}
    expected |= {f"{name}_tokens": count for name, (_, count) in sums.items()}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert sum(value for key, value in found.items() if key.endswith("_tokens")) == 4 * (BLOCK - 1)
