"""`ChannelCollator` around the collators that people use: the real ones of transformers and TRL."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

from channel_metrics import ChannelCollator, ChannelTable

Record = dict[str, Any]


def tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Bytes as tokens: nothing to download."""
    characters = ["<pad>", "<mask>", *sorted(ByteLevel.alphabet())]
    model = Tokenizer(BPE({c: i for i, c in enumerate(characters)}, []))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        mask_token="<mask>",
        padding_side=padding_side,
    )


def records(*texts: str, labels: bool = False, mask: bool = False) -> list[Record]:
    """One record per text, of the channels bbu, rru, bbu, ...; in the field that fusions use."""
    found = []
    for i, text in enumerate(texts):
        ids = tokenizer()(text)["input_ids"]
        record: Record = {"input_ids": ids}
        if labels:
            record["labels"] = list(ids)
        if mask:
            record["attention_mask"] = [1] * len(ids)
        record["metadata"] = {"_fusion_source": ["bbu", "rru"][i % 2], "_fusion_domain": "target"}
        found.append(record)
    return found


def user_function(features: list[Record]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([feature["input_ids"][:2] for feature in features])}


SHORT = records("ab", "cd", "ef", labels=True)
MIXED = records("abcd", "e", "fgh")
LABELED = records("abcd", "e", "fgh", labels=True)
PADDED, PACKED = [0, 4, 8, 12], [0, 4, 5, 8]
LEFT = tokenizer("left")
FREE = TrlCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=16)
# trl 0.22 masks the pads at the end; then they stand in the last sequence, and are not counted.
PADS_ARE_MASKED = FREE([{"input_ids": [1]}]).get("attention_mask", torch.ones(0)).numel() == 16
PACKED_TO_16 = [0, 4, 5, 16] if PADS_ARE_MASKED else PACKED
_KNOWN = inspect.signature(DataCollatorWithFlattening.__init__).parameters
# Older releases lack some of the options.
FLATTENING = [
    options
    for options in (
        {},
        {"position_ids_start": 2},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {
            "return_position_ids": False,
            "return_flash_attn_kwargs": True,
            "return_seq_idx": True,
        },
        {"return_position_ids": False, "return_seq_idx": True},
    )
    if options.keys() <= _KNOWN.keys()
]


@pytest.mark.filterwarnings("ignore:You're using a PreTrainedTokenizerFast:UserWarning")
@pytest.mark.parametrize(
    ("base", "features", "bounds"),
    [
        (default_data_collator, SHORT, [0, 2, 4, 6]),
        (DataCollatorWithPadding(tokenizer()), MIXED, PADDED),
        (DataCollatorWithPadding(LEFT, pad_to_multiple_of=8), MIXED, [0, 8, 16, 24]),
        (DataCollatorForSeq2Seq(tokenizer()), LABELED, PADDED),
        (DataCollatorForSeq2Seq(LEFT), LABELED, PADDED),
        (DataCollatorForLanguageModeling(tokenizer(), mlm=False), MIXED, PADDED),
        (DataCollatorForLanguageModeling(LEFT, mlm=False), MIXED, PADDED),
        (DataCollatorForLanguageModeling(tokenizer(), mlm=True), MIXED, PADDED),
        (DataCollatorWithFlattening(), LABELED, PACKED),
        *((DataCollatorWithFlattening(**options), MIXED, PACKED) for options in FLATTENING),
        (TrlCollator(pad_token_id=0), MIXED, PADDED),
        (TrlCollator(pad_token_id=0, pad_to_multiple_of=8), LABELED, [0, 8, 16, 24]),
        (TrlCollator(pad_token_id=0, padding_free=True), MIXED, PACKED),
        (FREE, MIXED, PACKED_TO_16),
        (user_function, SHORT, [0, 2, 4, 6]),
    ],
)
def test_the_batch_of_the_base_and_its_channels(
    base: Callable[[list[Record]], Any], features: list[Record], bounds: list[int]
) -> None:
    stripped = [{k: v for k, v in f.items() if k != "metadata"} for f in features]
    torch.manual_seed(1)
    expected = dict(base(stripped))
    table = ChannelTable(["rru", "bbu"])
    for collate in (ChannelCollator(base), ChannelCollator(base, table=table)):
        torch.manual_seed(1)
        batch = dict(collate(features))
        channels, cu_seqlens = batch.pop("channels"), batch.pop("cu_seqlens")
        assert cu_seqlens.tolist() == bounds
        assert cu_seqlens.dtype == torch.int32
        if collate.table is None:
            assert channels == ["bbu", "rru", "bbu"]
        else:
            assert channels.tolist() == [1, 0, 1]
            assert channels.dtype == torch.int64
        assert list(batch) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(batch[key], value, rtol=0, atol=0)
    assert "metadata" in features[0]  # the caller's records are untouched


def test_encoder_and_decoder_of_different_lengths() -> None:
    features = [
        {"input_ids": [1, 2, 3], "labels": [4], "channel": "a"},
        {"input_ids": [1], "labels": [4, 5, 6, 7], "channel": "b"},
    ]
    batch = ChannelCollator(DataCollatorForSeq2Seq(tokenizer()))(features)
    assert batch["cu_seqlens"].tolist() == [0, 4, 8]
    assert batch["channels"] == ["a", "b"]


def fields_collator(features: list[Any]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([feature.input_ids for feature in features])}


@dataclass
class Sample:
    input_ids: list[int]
    dataset_source: str


def test_records_that_are_objects() -> None:
    collate = ChannelCollator(fields_collator)
    assert collate([Sample([1, 2], "a"), Sample([3, 4], "b")])["channels"] == ["a", "b"]


def test_bounds_key_and_rows_without_bounds() -> None:
    collate = ChannelCollator(user_function, bounds_key="channel_bounds", row_bounds=False)
    assert set(collate(SHORT)) == {"input_ids", "channels"}
    packed = ChannelCollator(
        DataCollatorWithFlattening(), bounds_key="channel_bounds", row_bounds=False
    )
    assert packed(MIXED)["channel_bounds"].tolist() == PACKED


def test_own_fields_and_strip() -> None:
    seen: list[set[str]] = []

    def base(features: list[Record]) -> dict[str, torch.Tensor]:
        seen.append(set(features[0]))
        return user_function(features)

    features = [{"input_ids": [1, 2], "meta": {"origin": "web"}, "channel": "x"}]
    assert ChannelCollator(base, fields=["meta.origin"])(features)["channels"] == ["web"]
    assert ChannelCollator(base, fields=["meta.origin"], strip=[])(features)["channels"] == ["web"]
    assert ChannelCollator(base)(features)["channels"] == ["x"]
    assert seen == [
        {"input_ids", "channel"},
        {"input_ids", "channel", "meta"},
        {"input_ids", "meta"},
    ]


def test_names_that_the_table_does_not_know_stay_names() -> None:
    features = [{"input_ids": [1, 2], "channel": name} for name in ("a", "new", None)]
    table = ChannelTable(["a"])
    assert ChannelCollator(user_function, table=table)(features)["channels"] == ["a", "new", None]
    assert table.names == ("a",)  # in a worker, a name that is added here is lost
    closed = ChannelTable(["a"], unknown="unlabeled")
    assert ChannelCollator(user_function, table=closed)(features)["channels"].tolist() == [
        0,
        -1,
        -1,
    ]


def test_attributes_of_the_base_show_through() -> None:
    base = TrlCollator(pad_token_id=3, padding_free=True)
    collate = ChannelCollator(base, fields=["meta.origin", "channel"], table=ChannelTable(["a"]))
    assert (collate.pad_token_id, collate.padding_free) == (3, True)
    assert not hasattr(collate, "no_such_attribute")
    # Copying and unpickling look at attributes before there is a base.
    assert not hasattr(ChannelCollator.__new__(ChannelCollator), "tokenizer")
    assert collate.roots == ("meta", "channel")
    other = collate.around(user_function)
    assert other.base is user_function
    assert (other.fields, other.table, other.strip) == (
        collate.fields,
        collate.table,
        collate.strip,
    )


def test_pickle() -> None:
    collate = ChannelCollator(DataCollatorWithFlattening(), table=ChannelTable(["bbu", "rru"]))
    again = pickle.loads(pickle.dumps(collate))
    assert again(MIXED)["channels"].tolist() == [0, 1, 0]
    assert again(MIXED)["cu_seqlens"].tolist() == PACKED
