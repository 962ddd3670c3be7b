"""Batches of ms-swift as they are: names and boundaries become ids, without ms-swift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from channel_metrics.core.axis_settings import ROLES, ROLES_FIELD
from channel_metrics.core.keys import ChannelTable
from channel_metrics.core.labels import DEFAULT_FIELDS
from channel_metrics.data.carried import with_roles
from channel_metrics.data.scan import class_names
from channel_metrics.data.token_marks import MARKS_KEY
from channel_metrics.errors import ChannelError
from channel_metrics.trainers.hf.columns import with_channel_column
from channel_metrics.trainers.swift.collator import SwiftCollator
from channel_metrics.trainers.swift.data import records_of


def packed(*lengths: int) -> dict[str, Any]:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": positions[None],
        "labels": positions[None],
        "position_ids": positions[None],
    }


def collated(batch: dict[str, Any], table: ChannelTable | None = None) -> dict[str, Any]:
    found: dict[str, Any] = SwiftCollator(lambda _: batch, table=table, strip=())([])
    return found


def test_padded_rows() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask, "channel": ["rru", None]}
    found = collated(batch, ChannelTable(["bbu", "rru"]))
    assert found["channels"].tolist() == [1, -1]
    assert found["cu_seqlens"].tolist() == [0, 3, 6]
    assert found["channel"] == ["rru", None]


@pytest.mark.parametrize("axes", [1, 3])
def test_one_padding_free_row(axes: int) -> None:
    """Also where the model's own position ids have several axes."""
    batch = packed(2, 3) | {"channel": ["bbu", "rru"]}
    if axes == 3:
        batch["text_position_ids"] = batch["position_ids"]
        batch["position_ids"] = torch.zeros(3, 1, 5, dtype=torch.int64)
    found = collated(batch)
    assert found["channels"] == ["bbu", "rru"]
    assert found["cu_seqlens"].tolist() == [0, 2, 5]


def test_no_channel_at_all() -> None:
    assert collated(packed(2, 3))["channels"] == [None, None]


def test_numbers_are_names() -> None:
    assert collated(packed(2, 3) | {"channel": [7, None]})["channels"] == ["7", None]


@pytest.mark.parametrize("channel", [["bbu", "rru"], ["bbu", None], None])
def test_roles_travel_with_the_channel_and_are_taken_off_it(channel: Any) -> None:
    """ms-swift gets its channels as they were."""
    numbers = {role: 10 * number for number, role in enumerate(ROLES, start=1)}
    batch = packed(2, 3)
    if channel is not None:
        of_tokens = [ROLES.index("user") + 1, 0, ROLES.index("assistant") + 1]
        batch["channel"] = [channel[0], with_roles(channel[1], of_tokens)]
    collator = SwiftCollator(lambda _: batch, strip=(), columns=((ROLES_FIELD, numbers),))
    found: dict[str, Any] = collator([])
    assert found.get("channel") == channel
    assert found["channels"] == (channel or [None, None])
    marks = [0] * 5 if channel is None else [0, 0, numbers["user"], 0, numbers["assistant"]]
    assert found[MARKS_KEY].tolist() == [marks]


def test_records_for_generation_pass() -> None:
    assert collated({"_data": [{"messages": []}]}) == {"_data": [{"messages": []}]}


@pytest.mark.parametrize(
    "segments", [[5, 4], [[2, 3], [4]], torch.tensor([5, 4])], ids=["sums", "lists", "tensor"]
)
def test_packs_of_one_group_each(segments: Any) -> None:
    batch = packed(2, 3, 4) | {"packed_group": ["rru", "bbu"], "packed_segments": segments}
    assert collated(batch)["channels"] == ["rru", "rru", "bbu"]


def test_one_pack() -> None:
    batch = packed(2, 3) | {"packed_group": ["rru"], "packed_segments": [5]}
    assert collated(batch)["channels"] == ["rru", "rru"]


def test_packs_in_rows_of_their_own() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    grouped = batch | {"packed_group": ["rru", "bbu"], "packed_segments": [4, 2]}
    assert collated(grouped)["channels"] == ["rru", "bbu"]


def test_packs_that_were_padded_to_rows_of_sequences() -> None:
    ids = torch.zeros(3, 4, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    grouped = batch | {"packed_group": ["rru", "bbu"], "packed_segments": [6, 3]}
    assert collated(grouped)["channels"] == ["rru", "rru", "bbu"]


def test_a_padded_tail_is_of_no_pack() -> None:
    batch = packed(2, 3, 1) | {"packed_group": ["rru"], "packed_segments": [5]}
    batch["labels"] = torch.tensor([[0, 1, 0, 1, 2, -100]])
    assert collated(batch)["channels"] == ["rru", "rru"]


def test_packs_of_one_group_tell_no_roles() -> None:
    batch = packed(2, 3) | {"packed_group": ["rru"], "packed_segments": [5]}
    collator = SwiftCollator(lambda _: batch, strip=(), columns=((ROLES_FIELD, {}),))
    with pytest.raises(ChannelError, match=r"one name per pack, so the roles .* are not known"):
        collator([])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"packed_group": ["a", "b"], "packed_segments": [5]}, "names 2 groups, but .* 1 entries"),
        ({"packed_group": ["a"]}, "names 1 groups, but packed_segments has 0 entries"),
        ({"packed_group": ["a", "b"], "packed_segments": [1, 4]}, "must hold whole sequences"),
        ({"channel": ["a"] * 3}, "name 3 channels but the batch holds 2 sequences"),
    ],
)
def test_what_does_not_fit_is_an_error(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ChannelError, match=message):
        collated(packed(2, 3) | keys)


RECORDS = [
    {"messages": "a", "metadata": {"_fusion_source": "bbu"}, "dataset_id": 1},
    {"messages": "b", "metadata": {"_fusion_source": None}, "dataset_id": 2},
]


def test_the_column_is_filled_from_the_first_field_that_is_there() -> None:
    filled = with_channel_column(Dataset.from_list(RECORDS), DEFAULT_FIELDS)
    assert filled["channel"] == ["bbu", "2"]
    assert filled.remove_columns("channel").to_list() == RECORDS
    again = with_channel_column(Dataset.from_list(RECORDS), DEFAULT_FIELDS)
    # The same data has the same cache.
    assert filled._fingerprint == again._fingerprint


def test_a_column_of_ones_own_wins_and_is_completed() -> None:
    records = [{**RECORDS[0], "channel": "x"}, {**RECORDS[1], "channel": None}]
    assert with_channel_column(Dataset.from_list(records), DEFAULT_FIELDS)["channel"] == ["x", "2"]


@pytest.mark.parametrize(
    "records", [[{"messages": "a"}], [{"messages": "a", "channel": "x"}], [{"metadata": {"n": 1}}]]
)
def test_nothing_to_fill(records: list[dict[str, Any]]) -> None:
    dataset = Dataset.from_list(records)
    assert with_channel_column(dataset, DEFAULT_FIELDS) is dataset


def test_a_stream_is_filled_on_the_way() -> None:
    stream = Dataset.from_list(RECORDS).to_iterable_dataset()
    filled = with_channel_column(stream, DEFAULT_FIELDS)
    assert isinstance(filled, IterableDataset)
    assert [record["channel"] for record in filled] == ["bbu", "2"]
    assert filled.features["channel"].dtype == "string"


def test_other_data_is_left_alone() -> None:
    assert with_channel_column(RECORDS, DEFAULT_FIELDS) is RECORDS


def test_the_records_inside_of_wrappers() -> None:
    class Wrapper:
        def __init__(self, dataset: Any) -> None:
            self.dataset = dataset

    dataset = Dataset.from_list(RECORDS)
    theirs = type("LazyLLMDataset", (Wrapper,), {"__module__": "swift.dataset.utils"})
    assert records_of(theirs(theirs(dataset))) is dataset
    somebody = Wrapper(dataset)
    assert records_of(theirs(somebody)) is somebody


CLASSES = Features({"kind": ClassLabel(names=["web", "code"]), "text": Value("string")})
NUMBERED = Dataset.from_dict({"kind": [1, 0, -1], "text": ["a", "b", "c"]}, features=CLASSES)


@pytest.mark.parametrize("column", ["channel", "kind"])
@pytest.mark.parametrize("streamed", [False, True])
def test_classes_have_names(streamed: bool, column: str) -> None:
    """ms-swift makes new records of a dataset, so the column must hold the names."""
    dataset = NUMBERED.to_iterable_dataset() if streamed else NUMBERED
    filled = with_channel_column(dataset, ("kind",), column)
    assert [record[column] for record in filled] == ["code", "web", None]
    assert filled.features[column] == Value("string")
    assert [record["text"] for record in filled] == ["a", "b", "c"]


def test_classes_of_a_trainer_that_the_patch_did_not_see() -> None:
    collator = SwiftCollator(
        lambda _: packed(2, 3) | {"channel": [1, 0]},
        strip=(),
        classes=class_names(NUMBERED.rename_column("kind", "channel"), ("channel",)),
    )
    assert collator([])["channels"] == ["code", "web"]
