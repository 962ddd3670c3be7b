"""The column that outlives preprocessing, and rows of several records, without a framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from channel_metrics.core.names import joint_name
from channel_metrics.data.collator_fault import CollatorFault
from channel_metrics.errors import ChannelError
from channel_metrics.trainers.hf.columns import (
    LENGTHS_COLUMN,
    NAMES_COLUMN,
    KeepsNames,
    with_channel_column,
)
from channel_metrics.trainers.hf.rows import RowsCollator

FIELDS = ("channel", "meta.source")
RECORDS = [{"text": "a", "meta": {"source": "web"}}, {"text": "b", "meta": {"source": None}}]
PAD = 9


def both(dataset: Dataset) -> list[Any]:
    return [dataset, dataset.to_iterable_dataset()]


def test_records_without_a_channel_have_that_of_their_dataset() -> None:
    for dataset in both(Dataset.from_list(RECORDS)):
        named = with_channel_column(dataset, FIELDS, NAMES_COLUMN, "code")
        assert [record[NAMES_COLUMN] for record in named] == ["web", "code"]
        assert [record["text"] for record in named] == ["a", "b"]


def test_a_dataset_without_any_field_has_its_own_channel() -> None:
    for dataset in both(Dataset.from_list([{"text": "a"}, {"text": "b"}])):
        named = with_channel_column(dataset, FIELDS, NAMES_COLUMN, "code")
        assert [record[NAMES_COLUMN] for record in named] == ["code", "code"]


def test_a_stream_whose_columns_are_not_known() -> None:
    stream = IterableDataset.from_generator(lambda: iter(RECORDS))
    assert stream.column_names is None
    named = with_channel_column(stream, FIELDS, NAMES_COLUMN, "code")
    assert [record[NAMES_COLUMN] for record in named] == ["web", "code"]


def test_a_column_with_a_dotted_name() -> None:
    dataset = Dataset.from_list([{"meta.source": "web"}, {"meta.source": ""}])
    assert with_channel_column(dataset, FIELDS, NAMES_COLUMN, "code")[NAMES_COLUMN] == [
        "web",
        "code",
    ]


def test_a_column_of_the_users_own_stays_as_it_is() -> None:
    """A framework may make a prompt of it."""
    features = Features({"channel": ClassLabel(names=["web"]), "text": Value("string")})
    dataset = Dataset.from_dict({"channel": [0, -1], "text": ["a", "b"]}, features=features)
    fields = (*FIELDS, "lang\x01text")
    named = with_channel_column(dataset, fields, NAMES_COLUMN, "code")
    assert named.remove_columns(NAMES_COLUMN).to_list() == dataset.to_list()
    assert named.features["channel"] == features["channel"]
    joint = [joint_name(name, [("lang", text)]) for name, text in (("web", "a"), ("code", "b"))]
    assert named[NAMES_COLUMN] == joint


def test_rows_of_records_keep_their_names() -> None:
    keep = KeepsNames(lambda record: {"ids": [len(record["text"])]} if record["text"] else None)
    assert keep({"text": "abc", NAMES_COLUMN: "web"}) == {"ids": [3], NAMES_COLUMN: "web"}
    assert keep({"text": "", NAMES_COLUMN: "web"}) is None


def test_a_record_may_give_several_rows_or_none() -> None:
    def halves(records: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # Without a word about which rows are whose, and all records at once.
        found = [
            text[start : start + 2] for text in records["text"] for start in range(0, len(text), 2)
        ]
        return {"half": found} if found else {}

    keep = KeepsNames(halves, batched=True)
    made = keep({"text": ["abc", "", "de"], NAMES_COLUMN: ["x", "y", "z"]})
    assert made == {"half": ["ab", "c", "de"], NAMES_COLUMN: ["x", "x", "z"]}
    assert keep({"text": [""], NAMES_COLUMN: ["x"]}) == {}


def collator(side: str = "right", *, width: int = 6) -> RowsCollator:
    """Around one that joins the records of a row, and pads it."""

    def base(features: list[Any]) -> dict[str, Any]:
        rows = []
        for feature in features:
            records = feature if isinstance(feature, list) else [feature]
            assert all(set(record) == {"input_ids"} for record in records), "only their own"
            ids = [token for record in records for token in record["input_ids"]]
            pads = [PAD] * (width - len(ids))
            rows.append([*pads, *ids] if side == "left" else [*ids, *pads])
        batch = torch.tensor(rows)
        return {"input_ids": batch, "labels": batch.masked_fill(batch == PAD, -100)}

    return RowsCollator(base, fields=(NAMES_COLUMN,), bounds_key="bounds", row_bounds=False)


def record(name: str | None, *ids: int) -> dict[str, Any]:
    return {"input_ids": list(ids), NAMES_COLUMN: name}


def pack(names: list[str | None], lengths: list[int], *ids: int) -> dict[str, Any]:
    return {"input_ids": list(ids), NAMES_COLUMN: names, LENGTHS_COLUMN: lengths}


FORMS: dict[str, list[Any]] = {
    "lists": [[record("a", 1, 2), record(None, 3)], [record("b", 4)]],
    "lengths": [pack(["a", None], [2, 1], 1, 2, 3), pack(["b"], [1], 4)],
    "lengths without padding": [pack(["a", None], [2, 1], 1, 2, 3, PAD), pack(["b"], [1], 4, PAD)],
}


@pytest.mark.parametrize(("side", "inner"), [("right", 2), ("left", 5)])
@pytest.mark.parametrize("form", ["lists", "lengths"])
def test_rows_of_several_records(form: str, side: str, inner: int) -> None:
    batch = collator(side)(FORMS[form])
    assert batch["channels"] == ["a", None, "b"]
    assert batch["bounds"].tolist() == [0, inner, 6, 12] and batch["bounds"].dtype == torch.int32


def test_padding_inside_of_a_pack_has_no_length() -> None:
    batch = collator()(FORMS["lengths without padding"])
    assert batch["channels"] == ["a", None, "b"] and batch["bounds"].tolist() == [0, 2, 6, 12]


def test_all_records_in_one_row() -> None:
    base = collator()
    joined = base.around(lambda records: base.base([records]))
    batch = joined([record("a", 1, 2), record("b", 3), record("c", 4, 5)])
    assert batch["channels"] == ["a", "b", "c"] and batch["bounds"].tolist() == [0, 2, 3, 6]


def test_rows_of_one_record_have_no_bounds() -> None:
    batch = collator()([record("a", 1, 2), record(None, 3)])
    assert batch["channels"] == ["a", None] and "bounds" not in batch


@pytest.mark.parametrize(
    "change", [lambda ids: ids.flip(0), lambda ids: ids + 1, lambda ids: ids[:, :2]]
)
def test_a_batch_with_other_tokens_is_an_error(change: Callable[[Any], Any]) -> None:
    base = collator()

    def other(features: list[Any]) -> dict[str, Any]:
        ids = change(base.base(features)["input_ids"])
        return {"input_ids": ids, "labels": ids}

    changed = base.around(other)
    with pytest.raises(ChannelError, match="must hold the 3 tokens of its records, but holds"):
        changed(FORMS["lists"])
    changed.carry_faults = True
    fault = changed(FORMS["lists"])["channels"]
    assert isinstance(fault, CollatorFault) and isinstance(fault.error, ChannelError)


def test_a_batch_without_labels_of_tokens_is_left_alone() -> None:
    base = collator()
    scores = base.around(lambda features: {**base.base(features), "labels": torch.rand(2)})
    assert "channels" not in scores(FORMS["lists"])
