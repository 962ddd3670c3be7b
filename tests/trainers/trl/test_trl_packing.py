"""Packs of the SFTTrainer: identical to those without channels, and attributed exactly."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer
from trl_sft_tools import (
    BFD,
    HAS_BOUNDS,
    HAS_SPLIT,
    OF_LETTER,
    SHUFFLES,
    SPLIT,
    MySFT,
    Seen,
    config,
    expected,
    sft,
)
from trl_tools import (
    CHANNELS,
    EOS,
    logs,
    text_records,
    tiny_model,
    token_records,
    windows,
    word,
)

from channel_metrics import ChannelError, ConfigError, MetricsConfig
from channel_metrics.core.labels import LabelTable
from channel_metrics.data.collator_fault import CollatorFault
from channel_metrics.trainers.trl.collator import PackCollator


def packed(folder: Path, trainer_class: Any, dataset: Any, **options: Any) -> Any:
    from channel_metrics.demo.tiny import byte_tokenizer

    return trainer_class(
        model=tiny_model(),
        args=config(folder, packing=True, **options),
        train_dataset=dataset,
        processing_class=byte_tokenizer(),
    ).train_dataset


def test_given_labels_are_left_as_trl_leaves_them(tmp_path: Path) -> None:
    """trl 0.29 drops them where it packs, and trains on all tokens."""
    records = [record | {"labels": [-100, *record["input_ids"][1:]]} for record in token_records(9)]
    theirs, ours = (
        packed(tmp_path, trainer_class, Dataset.from_list(records)).column_names
        for trainer_class in (SFTTrainer, MySFT)
    )
    assert set(ours) == {*theirs, "channel_ids"}


@pytest.mark.parametrize(
    ("strategy", "num_proc", "shuffle"),
    [
        (BFD, None, SHUFFLES),
        (BFD, 2, False),
        *([(SPLIT, None, False)] if HAS_SPLIT else []),
        ("wrapped", None, SHUFFLES),
    ],
)
def test_packs_are_identical(
    tmp_path: Path, strategy: str, num_proc: int | None, shuffle: bool
) -> None:
    """Every column that TRL makes, row by row; more rows than one batch of the packer."""
    options = {
        "packing_strategy": strategy,
        "max_length": 11,
        "dataset_num_proc": num_proc,
    } | ({"shuffle_dataset": True} if shuffle else {})
    records = Dataset.from_list(text_records(1300))
    theirs = packed(tmp_path, SFTTrainer, records, **options)
    ours = packed(tmp_path, MySFT, records, **options)
    assert set(ours.column_names) == {*theirs.column_names, "channel_ids"}
    for column in theirs.column_names:
        assert ours[:][column] == theirs[:][column]
    for row in ours:
        for token, number in zip(row["input_ids"], row["channel_ids"], strict=True):
            assert token == EOS or OF_LETTER[token] == sorted(CHANNELS)[number]


def test_packs_of_masked_conversations_are_identical(tmp_path: Path) -> None:
    """Masks are packed along, whatever columns the versions keep them in."""
    rng = random.Random(0)
    records = [
        {
            "prompt": word(rng, name, 2, 5),
            "completion": word(rng, name, 2, 9),
            "metadata": {"_fusion_source": name},
        }
        for name in CHANNELS * 10
    ]
    theirs, ours = (packed(tmp_path, c, Dataset.from_list(records)) for c in (SFTTrainer, MySFT))
    assert "metadata" not in ours.column_names
    for column in theirs.column_names:
        assert ours[:][column] == theirs[:][column]


def test_a_stream_is_packed_with_declared_channels(tmp_path: Path) -> None:
    stream = Dataset.from_list(text_records(96)).to_iterable_dataset()
    with pytest.raises(ChannelError, match="must have declared channels"):
        packed(tmp_path, MySFT, stream)
    seen = Seen()
    trainer = sft(
        tmp_path,
        MySFT,
        stream,
        packing=True,
        before=seen,
        learning_rate=0.0,
        channel_metrics=MetricsConfig(channels=("rru", "bbu", "lang_chat", "lvis")),
    )
    for entry, window in zip(logs(trainer), windows(seen.batches[True], 4), strict=True):
        assert entry == pytest.approx(expected(trainer.model, window), rel=2e-5)


def test_cached_packs_keep_their_names(tmp_path: Path) -> None:
    """From files, a second trainer reads the packs of the first; other data gets other numbers."""
    found = []
    for names in (CHANNELS, CHANNELS, CHANNELS[1:]):
        folder = tmp_path / "_".join(names)
        if not folder.exists():
            rows = [r for r in text_records(96) if r["channel"] in names]
            Dataset.from_list(rows).save_to_disk(folder)
        seen = Seen()
        trainer = sft(
            tmp_path,
            MySFT,
            Dataset.load_from_disk(folder),
            packing=True,
            before=seen,
            learning_rate=0.0,
        )
        for entry, window in zip(logs(trainer), windows(seen.batches[True], 4), strict=True):
            assert entry == pytest.approx(expected(trainer.model, window), rel=2e-5)
        found.append(logs(trainer))
    assert found[0] == found[1] != found[2]


def test_a_typo_in_eval_channels_is_an_error_with_packs_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'rru'"):
        sft(
            tmp_path,
            MySFT,
            packing=True,
            eval_dataset=Dataset.from_list(text_records(12, seed=5)),
            channel_metrics=MetricsConfig(eval_channels=("ruu",)),
        )


@pytest.mark.skipif(not HAS_BOUNDS, reason="without bounds, tokens are counted one by one")
def test_samples_of_packs_are_sequences(tmp_path: Path) -> None:
    records = text_records(24)
    trainer = sft(
        tmp_path,
        MySFT,
        records,
        packing=True,
        num_train_epochs=1,
        max_steps=-1,
        gradient_accumulation_steps=1,
        logging_steps=1,
        channel_metrics=MetricsConfig(metrics=("samples", "samples_total", "tokens_total")),
    )
    last = logs(trainer)[-1]
    for name in CHANNELS:
        mine = [record["text"] for record in records if record["channel"] == name]
        assert sum(entry.get(f"{name}_samples", 0) for entry in logs(trainer)) == len(mine)
        if f"{name}_samples" in last:
            # Every letter but the first, and the end of the text.
            assert last[f"{name}_tokens_total"] == sum(map(len, mine))


@pytest.mark.parametrize("length", [3, 6])
def test_a_collator_that_cuts_or_adds_tokens_of_packs_is_refused(length: int) -> None:
    """The channels of the tokens of a pack are matched to its labels by position."""
    batch = {"labels": torch.ones(1, length, dtype=torch.int64)}
    record = {"input_ids": [1] * 5, "channel_ids": [0, 0, 1, 1, 1], "seq_lengths": [2, 3]}
    collate = PackCollator(lambda _: dict(batch), names=("a", "b"), table=LabelTable(["a", "b"]))
    fault = collate([record])["channels"]
    assert isinstance(fault, CollatorFault) and isinstance(fault.error, ChannelError)
    assert f"the packs hold 5 tokens, but the batch {length}" in str(fault.error)


def with_axes(folder: Path, config: MetricsConfig, records: Any, **options: Any) -> list[Any]:
    found: list[Any] = []

    def prepare(trainer: Any) -> None:
        trainer.channel_metrics.on_window.append(found.append)

    given = {"packing": True, "packing_strategy": BFD, "channel_metrics": config, **options}
    sft(folder, MySFT, records, prepare=prepare, **given)
    return found


def test_labels_of_further_axes_in_packs(tmp_path: Path) -> None:
    """An axis is what its column is as the channel."""
    records = [
        record | {"lang": ("de", "en", None)[i % 3]} for i, record in enumerate(text_records(96))
    ]
    axes = MetricsConfig(axes={"lang": "lang", "kind": {"bbu": "x"}})
    ours = with_axes(tmp_path, axes, records)
    alone = with_axes(tmp_path, MetricsConfig(fields=("lang",)), records)
    assert len(ours) > 1
    for window, other in zip(ours, alone, strict=True):
        assert window.axes["lang"] == other.values
        assert window.axes["kind"]["x"] == window.values["bbu"]


def test_a_packed_stream_has_no_labels_in_its_records(tmp_path: Path) -> None:
    records = [record | {"lang": "de"} for record in text_records(24)]
    config = MetricsConfig(axes={"lang": "lang"}, channels=CHANNELS)
    stream = Dataset.from_list(records).to_iterable_dataset()
    with pytest.raises(ChannelError, match="map channels to labels in `axes`"):
        with_axes(tmp_path, config, stream, max_steps=2)
