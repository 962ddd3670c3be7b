"""Collators that sort, replace, drop or change records: the channels follow, or it is an error."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from collator_tools import (
    Base,
    Record,
    left,
    longest_first,
    padded,
    record,
    unmasked,
    unmasked_left,
)
from reference import Batch, reference_metrics
from transformers import DataCollatorWithFlattening

from channel_metrics import ChannelCollator, ChannelError, ChannelLossAccumulator, ChannelTable
from channel_metrics.data import collator as collator_module
from channel_metrics.data.collator import RECORDS_KEY
from channel_metrics.data.record_order import tokens_of_records

BASES: list[Base] = [padded, left, unmasked, unmasked_left, DataCollatorWithFlattening()]


@pytest.mark.parametrize("base", BASES)
def test_channels_follow_records_that_are_sorted(base: Base) -> None:
    """10 tokens of `short` and 20 of `long`: the values are those of a loop over the records."""
    records = [record(10, "short", 100), record(20, "long", 200)]
    table = ChannelTable(["short", "long"])
    batch = ChannelCollator(lambda r: longest_first(r, base), table=table)(records)
    assert batch["channels"].tolist() == [1, 0]
    metrics = ChannelLossAccumulator(table, metrics=["loss", "tokens", "samples"])
    # The loss of a token is its number.
    losses = batch["input_ids"].double()
    metrics.update(
        losses,
        channels=batch["channels"],
        cu_seqlens=batch["cu_seqlens"],
        loss_mask=batch["input_ids"] != 0,
    )
    one_by_one = [
        Batch([float(i) for i in r["input_ids"]], [r["channel"]], [0, len(r["input_ids"])])
        for r in records
    ]
    expected = reference_metrics(one_by_one)
    assert metrics.compute() == {
        key: value for key, value in expected.items() if key.endswith(("loss", "tokens", "samples"))
    }
    assert expected["short_tokens"] == 10 and expected["short_loss"] == 104.5


@pytest.mark.parametrize("base", BASES)
def test_any_order_of_many_records(base: Base) -> None:
    """Some share their beginning, some are equal."""
    rng = random.Random(0)
    records = [record(3 + i % 5, f"c{i}", 100 + 10 * (i // 5)) for i in range(20)]
    records += [record(4, "same", 900), record(4, "same", 900)]
    for _ in range(20):
        order = rng.sample(range(22), 22)

        def ordered(records: list[Record], order: list[int] = order) -> dict[str, Any]:
            return base([records[i] for i in order])

        batch = ChannelCollator(ordered, records_key=RECORDS_KEY)(records)
        assert batch["channels"] == [records[i]["channel"] for i in order]
        found = batch[RECORDS_KEY].tolist()
        assert [records[i]["input_ids"] for i in found] == [records[i]["input_ids"] for i in order]
        assert sorted(found) == list(range(22))


def test_packed_records_are_followed_as_wholes() -> None:
    """Records of two sequences and of one, flattened in another order."""
    records = [
        {"input_ids": [1, 2, 3, 4, 5], "lengths": [2, 3], "channel": ["a", "b"]},
        {"input_ids": [6, 7], "lengths": [2], "channel": ["c"]},
    ]

    def flattened(features: list[Record]) -> dict[str, Any]:
        ids = [i for f in features[::-1] for i in f["input_ids"]]
        positions = [p for f in features[::-1] for n in f["lengths"] for p in range(n)]
        return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}

    batch = ChannelCollator(flattened)(records)
    assert batch["channels"] == ["c", "a", "b"]
    assert batch["cu_seqlens"].tolist() == [0, 2, 4, 7]


def cut_right(records: list[Record]) -> dict[str, Any]:
    return padded([{"input_ids": r["input_ids"][:4]} for r in records])


def cut_left(records: list[Record]) -> dict[str, Any]:
    return padded([{"input_ids": r["input_ids"][-4:]} for r in records])


def ended(records: list[Record]) -> dict[str, Any]:
    return padded([{"input_ids": [*r["input_ids"], 7]} for r in records])


def noisy(records: list[Record]) -> dict[str, Any]:
    """One token of each record is another one."""
    return padded([{"input_ids": [*r["input_ids"][:2], 7, *r["input_ids"][3:]]} for r in records])


def expanded(records: list[Record]) -> dict[str, Any]:
    """One token of each record becomes many, as an image does."""
    return padded(
        [{"input_ids": [*r["input_ids"][:2], *[7] * 30, *r["input_ids"][3:]]} for r in records]
    )


def hidden(records: list[Record]) -> dict[str, Any]:
    """A masked language model: what is hidden stands in the labels only."""
    batch = padded(records)
    hide = torch.arange(batch["labels"].shape[1]) % 2 == 0
    batch["labels"] = batch["labels"].where(hide, -100)
    batch["input_ids"] = batch["input_ids"].where(~hide, 7)
    return batch


def corrupted(records: list[Record]) -> dict[str, Any]:
    """T5's spans: some records keep most of their tokens, some keep few."""
    return padded(
        [{"input_ids": [*r["input_ids"][: (4, 2, 1)[i]], 7, 7]} for i, r in enumerate(records)]
    )


def rewritten(records: list[Record]) -> dict[str, Any]:
    """Other tokens for all records: nothing can be compared."""
    return padded([{"input_ids": [i + 1000 for i in r["input_ids"]]} for r in records])


@pytest.mark.parametrize(
    "base", [padded, cut_right, cut_left, ended, noisy, expanded, hidden, corrupted, rewritten]
)
def test_collators_that_keep_the_order(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    records = [record(5 + i, "abc"[i], 100 * (i + 1)) for i in range(3)]
    collate = ChannelCollator(base, records_key=RECORDS_KEY)
    for _ in range(3):
        batch = collate(records)
        assert batch["channels"] == ["a", "b", "c"]
        assert RECORDS_KEY not in batch
    assert caplog.records == []


def test_records_that_are_cut_and_sorted() -> None:
    records = [record(5 + i, "abc"[i], 100 * (i + 1)) for i in range(3)]
    assert ChannelCollator(lambda r: longest_first(r, cut_right))(records)["channels"] == [*"cba"]


OTHER = record(12, "x", 900)


@pytest.mark.parametrize(
    "base",
    [
        lambda r: padded([r[0], OTHER, r[2]]),
        lambda r: padded([r[0], r[0], r[2]]),
        lambda r: padded([r[1], r[0], r[0]]),
        lambda r: DataCollatorWithFlattening()([r[0], {"input_ids": OTHER["input_ids"]}, r[2]]),
        # As many sequences as channels, but of two records.
        lambda r: {
            "input_ids": torch.tensor([[*r[0]["input_ids"], *r[2]["input_ids"]]]),
            "cu_seqlens": torch.tensor([0, 5, 8, 12]),
        },
    ],
    ids=["replaced", "doubled", "swapped and doubled", "flattened", "dropped and split"],
)
def test_records_that_are_replaced(base: Base) -> None:
    records = [record(5 + i, "abc"[i], 100 * (i + 1)) for i in range(3)]
    message = "holds the tokens of none of its 3 records: the collator reorders, drops or replaces"
    with pytest.raises(ChannelError, match=message):
        ChannelCollator(base)(records)


@pytest.mark.parametrize("base", [padded, DataCollatorWithFlattening()])
def test_records_that_are_dropped(base: Base) -> None:
    records = [record(5 + i, "abc"[i], 100 * (i + 1)) for i in range(3)]
    with pytest.raises(ChannelError, match="drops or adds records must return `channels` itself"):
        ChannelCollator(lambda r: base(r[1:]))(records)


def test_one_record_that_is_replaced_after_others_were_not() -> None:
    """In batches of one record there is nothing else to compare with."""
    collate = ChannelCollator(lambda r: padded([r[0] if r[0]["input_ids"][0] == 100 else OTHER]))
    collate([record(5, "a", 100)])
    with pytest.raises(ChannelError, match="replaces records"):
        collate([record(5, "b", 200)])


def test_records_without_tokens_cannot_be_compared() -> None:
    """Then nothing is claimed: they must keep their order."""
    batch = padded([record(5, None), record(7, None, 200)])
    assert ChannelCollator(lambda _: batch)([{"channel": "a"}, {"channel": "b"}])["channels"] == [
        *["a", "b"]
    ]
    texts = [{"channel": "a", "input_ids": "text"}, {"channel": "b", "input_ids": [[1]]}]
    batch.pop("channels")
    assert ChannelCollator(lambda _: batch)(texts)["channels"] == ["a", "b"]


def test_an_encoders_input_beside_labels_of_another_length() -> None:
    def swapped(records: list[Record]) -> dict[str, Any]:
        return padded(records[::-1]) | {"labels": torch.ones(2, 3, dtype=torch.int64)}

    records = [record(5, "a", 100), record(7, "b", 200)]
    assert ChannelCollator(swapped)(records)["channels"] == ["b", "a"]


def test_first_batches_and_a_sample_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counting(records: Any) -> Any:
        looks.append(len(records))
        return tokens_of_records(records)

    monkeypatch.setattr(collator_module, "tokens_of_records", counting)
    records = [record(3, "a", 100), record(4, "b", 200)]
    ordered, sorting = ChannelCollator(padded), ChannelCollator(longest_first)
    for _ in range(250):
        ordered(records)
    assert len(looks) == 8 + 2
    # Where records change their order once, every batch is compared.
    for _ in range(50):
        assert sorting(records)["channels"] == ["b", "a"]
    assert len(looks) == 10 + 50


def test_an_order_that_changes_later_is_told(caplog: pytest.LogCaptureFixture) -> None:
    late = [False]
    collate = ChannelCollator(lambda r: longest_first(r) if late[0] else padded(r))
    records = [record(3, "a", 100), record(4, "b", 200)]
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            collate(records)
        late[0] = True
        found = [collate(records)["channels"] for _ in range(60)]
    assert found == [["a", "b"]] * 50 + [["b", "a"]] * 10
    (told,) = [entry.getMessage() for entry in caplog.records]
    assert "up to 99 batches before this one may have been counted under other channels" in told
