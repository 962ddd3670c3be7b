"""How channels get from the records to the metrics, and what is said when they do not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from hf_tools import CHANNELS, PaddingCollator, channel_logs, make_records, tiny_model, train
from transformers import BertConfig, BertForSequenceClassification, DataCollatorForSeq2Seq, Trainer

from channel_metrics import ChannelError, ConfigError, MetricsConfig, UnsupportedVersionError
from channel_metrics.data.scan import count_channels
from channel_metrics.trainers.hf import attach

FIELDS = MetricsConfig().fields


def counted(records: list[dict[str, Any]]) -> dict[str, int]:
    """{channel: supervised targets} by counting."""
    totals: dict[str, int] = {}
    for record in records:
        name = record.get("channel") or "unlabeled"
        totals[name] = totals.get(name, 0) + sum(label != -100 for label in record["labels"][1:])
    return totals


def without(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "channel"}


def logged(trainer: Trainer) -> dict[str, int]:
    totals: dict[str, int] = {}
    for entry in channel_logs(trainer):
        for key, value in entry.items():
            if key.endswith("_tokens") and not key.startswith("eval_"):
                name = key.removesuffix("_tokens")
                totals[name] = totals.get(name, 0) + int(value)
    return totals


class MapStyle(torch.utils.data.Dataset[Any]):
    """A dataset that cannot be scanned: names are met on the way."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]


class Streaming(torch.utils.data.IterableDataset[Any]):
    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from self.records[start::step]


def arrow_stream(records: list[dict[str, Any]]) -> IterableDataset:
    return Dataset.from_list(records).to_iterable_dataset(num_shards=2)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [Dataset.from_list, MapStyle, Streaming, arrow_stream])
def test_no_record_is_lost(
    tmp_path: Path, make: Any, workers: int, remove_unused_columns: bool
) -> None:
    records = make_records(32)
    trainer = train(
        tmp_path,
        prepare=attach,
        records=make(records),
        max_steps=8,
        logging_steps=3,
        dataloader_num_workers=workers,
        remove_unused_columns=remove_unused_columns,
    )
    assert logged(trainer) == counted(records)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_the_users_collator_sees_what_it_always_saw(
    tmp_path: Path, remove_unused_columns: bool
) -> None:
    seen: list[list[set[str]]] = []
    for prepare in (None, attach):

        class Recording(PaddingCollator):
            def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
                seen[-1].extend(set(feature) for feature in features)
                return super().__call__(features)

        seen.append([])
        train(
            tmp_path,
            prepare=prepare,
            max_steps=2,
            remove_unused_columns=remove_unused_columns,
            trainer_arguments={"data_collator": Recording()},
        )
    assert seen[0] == seen[1]
    assert all(("channel" in keys) != remove_unused_columns for keys in seen[1])


def test_transformers_collator_does_not_choke_on_the_name(tmp_path: Path, tokenizer: Any) -> None:
    records = make_records(32)
    trainer = train(
        tmp_path,
        prepare=attach,
        records=records,
        max_steps=8,
        remove_unused_columns=False,
        trainer_arguments={"data_collator": DataCollatorForSeq2Seq(tokenizer)},
    )
    assert logged(trainer) == counted(records)


def test_nested_field_and_unlabeled_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = make_records(32)
    nested = []
    for index, record in enumerate(records):
        if index % 5 == 0:
            record["channel"] = None
        name = record["channel"]
        nested.append({**record, "channel": None, "metadata": {"_fusion_source": name}})
    trainer = train(tmp_path, prepare=attach, records=nested, max_steps=8)
    assert logged(trainer) == counted(records)
    assert "7 of 32 records of the train set have no channel" in caplog.text


def test_eval_set_without_channels_is_unlabeled(tmp_path: Path) -> None:
    held_out = [without(r) for r in make_records(8, seed=1)]
    trainer = train(
        tmp_path,
        prepare=attach,
        trainer_arguments={"eval_dataset": Dataset.from_list(held_out)},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_unlabeled_tokens"] == counted(held_out)["unlabeled"]
    assert metrics["eval_unlabeled_share"] == 1.0


@pytest.mark.parametrize("make", [Dataset.from_list, MapStyle])
def test_declared_channels_hold(tmp_path: Path, make: Any) -> None:
    records = make_records(32)
    strict = MetricsConfig(channels=("bbu", "rru"), unknown="error")
    with pytest.raises(ChannelError, match=r"channel 'l\w+' is not in the declared table"):
        train(tmp_path, prepare=lambda t: attach(t, strict), records=make(records))
    lenient = MetricsConfig(channels=("bbu", "rru"), unknown="unlabeled")
    trainer = train(
        tmp_path, prepare=lambda t: attach(t, lenient), records=make(records), max_steps=8
    )
    expected = counted(records)
    expected["unlabeled"] = expected.pop("lvis") + expected.pop("lang_chat")
    assert logged(trainer) == expected


def test_no_channel_at_all_is_an_error_at_start(tmp_path: Path) -> None:
    bare = [without(r) for r in make_records(8)]
    with pytest.raises(ChannelError) as error:
        train(tmp_path, prepare=attach, records=bare)
    assert str(error.value) == (
        "none of the 8 records of the train set has a channel: looked for channel, "
        "dataset_source, metadata._fusion_source, dataset_id, found columns input_ids, "
        "attention_mask, labels; set `fields` to the one that names the source."
    )


def test_no_channel_in_a_stream_is_said_at_the_first_window(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = [without(r) for r in make_records(16)]
    train(tmp_path, prepare=attach, records=Streaming(bare))
    assert caplog.text.count("no record of this train window had a channel") == 1


def test_a_nested_field_of_a_stream_is_a_column_with_channels(tmp_path: Path) -> None:
    """Of a patched script, which says so if no column of the first batch may hold a channel."""
    records = make_records(16)
    nested = [without(r) | {"metadata": {"_fusion_source": r["channel"]}} for r in records]
    config = MetricsConfig(on_error="raise")
    trainer = train(
        tmp_path,
        prepare=lambda trainer: attach(trainer, config, whole_script=True),
        records=Streaming(nested),
    )
    assert logged(trainer) == counted(records)


def test_a_loader_without_our_collator_is_an_error(tmp_path: Path) -> None:
    class OwnLoader(Trainer):
        def get_train_dataloader(self) -> Any:
            records = [without(r) for r in make_records(8)]
            return torch.utils.data.DataLoader(
                MapStyle(records), batch_size=4, collate_fn=PaddingCollator()
            )

    with pytest.raises(ChannelError, match=r"wrap its collate_fn with .*ChannelCollator"):
        train(tmp_path, prepare=attach, trainer_class=OwnLoader)


@pytest.mark.parametrize("name", ["train", "eval", "num"])
def test_a_channel_must_not_overwrite_the_trainers_keys(tmp_path: Path, name: str) -> None:
    records = make_records(8, channels=(name, "bbu"))
    with pytest.raises(ConfigError, match="which is the trainer's own key"):
        train(tmp_path, prepare=attach, records=records)


def test_names_that_collide_are_an_error_at_start(tmp_path: Path) -> None:
    records = make_records(16, channels=("a b", "a*b"))
    with pytest.raises(ChannelError, match=r"'a b' and 'a\*b' would both be logged as 'a_b'"):
        train(tmp_path, prepare=attach, records=records)


def test_classification_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=61, intermediate_size=32, **sizes))
    records = [{**r, "labels": [1]} for r in make_records(8)]

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        padded = PaddingCollator()([{**f, "labels": f["input_ids"]} for f in features])
        return {**padded, "labels": torch.tensor([f["labels"][0] for f in features])}

    with pytest.raises(UnsupportedVersionError, match="one for each token, but Trainer got"):
        train(
            tmp_path,
            prepare=attach,
            model=model,
            records=records,
            trainer_arguments={"data_collator": collate},
        )


def test_labels_of_padding_are_counted_as_the_trainer_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Careless(PaddingCollator):
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = super().__call__(features)
            return {**batch, "labels": batch["input_ids"].clone()}

    trainer = train(
        tmp_path,
        prepare=attach,
        logging_steps=1,
        max_steps=2,
        trainer_arguments={"data_collator": Careless()},
    )
    assert "labels stand on padding" in caplog.text
    for entry in trainer.state.log_history[:2]:
        total = sum(
            entry[f"{c}_loss"] * entry[f"{c}_share"] for c in CHANNELS if f"{c}_loss" in entry
        )
        assert total == pytest.approx(entry["loss"], rel=1e-5)


def test_counts_are_read_from_any_column() -> None:
    records: list[dict[str, Any]] = [
        {"dataset_id": 3, "text": "a"},
        {"dataset_id": None, "text": "b"},
        {"dataset_id": 4, "text": "c"},
    ]
    assert count_channels(Dataset.from_list(records), FIELDS) == {"3": 1, None: 1, "4": 1}
    packs = [{"channel": ["a", "b"]}, {"channel": ["b", None]}]
    assert count_channels(Dataset.from_list(packs), FIELDS) == {"a": 1, "b": 2, None: 1}
    assert count_channels(Dataset.from_list([{"x": 1}]), FIELDS) == {None: 1}
    assert count_channels(MapStyle(records), FIELDS) is None
    subset = Dataset.from_list(packs).select([1])
    assert count_channels(subset, FIELDS) == {"b": 1, None: 1}


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


@pytest.fixture(autouse=True)
def _show_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "channel_metrics")


def test_model_is_tiny() -> None:
    assert sum(p.numel() for p in tiny_model().parameters()) < 20_000
