"""What `ChannelCollator` checks on the host: counts, packs, labels; words that say what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from channel_metrics import BoundaryError, ChannelCollator, ChannelError, ChannelTable

Records = list[dict[str, Any]]


def gives(**batch: Any) -> Callable[[Records], dict[str, Any]]:
    """A collator that returns this batch, lists as tensors, whatever the records are."""
    return lambda _: {k: torch.tensor(v) if isinstance(v, list) else v for k, v in batch.items()}


def named(*channels: Any) -> Records:
    return [{"channel": channel} for channel in channels]


ROW = [[5, 5, 5, 5]]
TWO_ROWS = [[5, 5, 5, 5], [5, 5, 5, 5]]


@pytest.mark.parametrize(
    ("batch", "records", "channels", "bounds"),
    [
        # A packed row lists its channels.
        ({"labels": ROW, "cu_seqlens": [0, 1, 4]}, named(["a", "b"]), ["a", "b"], [0, 1, 4]),
        # Two packed rows, of two and one sequences.
        (
            {"labels": TWO_ROWS, "attention_mask": [[1, 1, 2, 2], [1, 1, 1, 1]]},
            named(["a", "b"], ["c"]),
            ["a", "b", "c"],
            [0, 2, 4, 8],
        ),
        # Rows with one channel each, whatever they are packed of.
        (
            {"labels": TWO_ROWS, "attention_mask": [[1, 1, 2, 0], [1, 2, 3, 3]]},
            named("a", "b"),
            ["a", "a", "b", "b", "b"],
            [0, 2, 4, 5, 6, 8],
        ),
        (
            {"labels": TWO_ROWS, "attention_mask": [[1, 1, 2, 0], [1, 2, 3, 3]]},
            named("a", ["x", None, "z"]),
            ["a", "a", "x", None, "z"],
            [0, 2, 4, 5, 6, 8],
        ),
        # Padding-free: records that are packs themselves.
        (
            {"labels": ROW, "position_ids": [[0, 1, 0, 0]]},
            named(["a", "b"], ["c"]),
            ["a", "b", "c"],
            [0, 2, 3, 4],
        ),
        # A row whose explicit bounds end before it does, or in an empty sequence.
        (
            {"labels": TWO_ROWS, "cu_seqlens": [0, 2, 4, 6]},
            named("a", "b"),
            ["a", "a", "b"],
            [0, 2, 4, 6],
        ),
        ({"labels": ROW, "cu_seqlens": [0, 4, 4]}, named("a"), ["a", "a"], [0, 4, 4]),
        (
            {"labels": TWO_ROWS, "cu_seqlens": [0, 4, 4, 8]},
            named(["a", "none"], "b"),
            ["a", "none", "b"],
            [0, 4, 4, 8],
        ),
        # No record of the batch has a channel.
        ({"labels": ROW, "cu_seqlens": [0, 1, 4]}, [{}, {}, {}], [None, None], [0, 1, 4]),
        ({"labels": TWO_ROWS}, [{}, {}], [None, None], [0, 4, 8]),
        # Pads that a collator appended look like sequences of one token.
        (
            {"labels": [[5, 5, 5, -100, -100]], "position_ids": [[0, 1, 0, 0, 0]]},
            named("a", "b"),
            ["a", "b"],
            [0, 2, 3],
        ),
        (
            {"labels": [[5, -100, -100, -100, -100]], "position_ids": [[0, 0, 0, 0, 0]]},
            named("a"),
            ["a"],
            [0, 1],
        ),
        # Pads at the ends of rows, whose positions start anew, as Axolotl counts them.
        *(
            (
                {
                    "labels": [[5, 6, -100, -100, -100], [-100, 7, 8, 9, -100]],
                    "input_ids": [[5, 6, 0, 0, 0], [0, 7, 8, 9, 0]],
                    "position_ids": [[0, 1, *pads], [0, 0, 1, 2, 0]],
                },
                named("a", "b"),
                ["a", "b"],
                [0, 5, 10],
            )
            for pads in ([0, 1, 2], [0, 0, 0])
        ),
        (
            {
                "labels": [[5, -100, -100]],
                "input_ids": [[5, 0, 0]],
                "position_ids": [[0, 0, 1]],
            },
            named("a"),
            ["a"],
            [0, 3],
        ),
        # An answer of other tokens is a sequence, and so is a row without supervised tokens.
        (
            {
                "labels": [[5, 6, -100, -100], [-100] * 4],
                "input_ids": [[5, 6, 7, 8], [3, 3, 3, 3]],
                "position_ids": [[0, 1, 0, 1], [0, 1, 0, 1]],
            },
            named("a", "b"),
            ["a", "a", "b", "b"],
            [0, 2, 4, 6, 8],
        ),
        # Sequences of several tokens are sequences, and so are those that are trained on.
        (
            {"labels": [[5, -100, -100, -100]], "position_ids": [[0, 0, 1, 0]]},
            named(["a", "b", "c"]),
            ["a", "b", "c"],
            [0, 1, 3, 4],
        ),
        # Nothing in the batch.
        ({"labels": torch.zeros(2, 0, dtype=torch.int64)}, named("a", "b"), ["a", "b"], [0, 0, 0]),
        ({"input_ids": torch.zeros(0, 3)}, [], [], [0]),
    ],
)
def test_one_channel_per_sequence(
    batch: dict[str, Any], records: Records, channels: list[str | None], bounds: list[int]
) -> None:
    found = ChannelCollator(gives(**batch))(records)
    assert found["channels"] == channels
    assert found["cu_seqlens"].tolist() == bounds
    ids = ChannelCollator(gives(**batch), table=ChannelTable("abcxz", unknown="unlabeled"))(records)
    known = {name: i for i, name in enumerate("abcxz")}
    assert ids["channels"].tolist() == [known.get(str(name), -1) for name in channels]


@pytest.mark.parametrize(
    ("batch", "records", "message"),
    [
        (
            {"labels": ROW},
            named("a", "b"),
            "name 2 channels but the batch holds 1 sequences (boundaries [0, 4]); a packer must",
        ),
        (
            {"labels": ROW, "position_ids": [[0, 1, 0, 1]]},
            named("a", "b", "c"),
            "name 3 channels but the batch holds 2 sequences (boundaries [0, 2, 4])",
        ),
        (
            {"labels": ROW, "position_ids": [[0, 1, 0, 0]]},  # labeled: these are no pads
            named("a", "b"),
            "name 2 channels but the batch holds 3 sequences",
        ),
        # A tail that is not all pads.
        (
            {"labels": [[5, 5, -100, 5, -100]], "position_ids": [[0, 1, 0, 0, 0]]},
            named("a", "b"),
            "name 2 channels but the batch holds 4 sequences",
        ),
        (
            {"labels": [[5, 5, -100, -100, -100]], "position_ids": [[0, 1, 0, 0, 1]]},
            named("a", "b", "c", "d"),
            "name 4 channels but the batch holds 3 sequences",
        ),
        (
            {"labels": [[5, 5, 5, -100, -100, -100]], "position_ids": [[0, 1, 0, 0, 0, 1]]},
            named("a", "b"),
            "name 2 channels but the batch holds 4 sequences",
        ),
        (
            {"labels": TWO_ROWS, "attention_mask": [[1, 1, 1, 1], [1, 1, 2, 2]]},
            named(["a", "b"], ["c"]),
            "name 3 channels but the batch holds 3 sequences ([2, 1] against [1, 2] per row, ",
        ),
        (
            {"labels": TWO_ROWS, "attention_mask": [[1, 1, 2, 2], [1, 2, 3, 4]]},
            named(["a", "b"], ["c", "d", "e"]),
            "([2, 3] against [2, 4] per row, boundaries",
        ),
        (
            {"labels": [[5] * 9], "position_ids": [[0] * 9]},
            named("a", "b"),
            "(boundaries [0, 1, 2, 3, 4, 5, 6, 7]...)",
        ),
        ({"labels": ROW, "channels": [1]}, named("a"), "as ids, but no table says what they mean"),
        ({"labels": ROW, "channels": "a"}, named("a"), "names or int64 ids [num_sequences]"),
        ({"labels": ROW, "channels": [[1.0]]}, named("a"), "one per sequence, but gave [1, 1]"),
        ({"labels": ROW, "channels": ("a", "b")}, named("a"), "name 2 channels but the batch"),
        ({"labels": ROW}, [(1, 2)], "an object with attributes to have a channel, but is tuple"),
        ({"labels": ROW}, named(1.5), "'channel' of a record must be a name or an integer"),
    ],
)  # fmt: skip
def test_refuses(batch: dict[str, Any], records: Any, message: str) -> None:
    with pytest.raises(ChannelError, match=re.escape(message)):
        ChannelCollator(gives(**batch))(records)


def test_refuses_batches_without_a_place_for_channels() -> None:
    with pytest.raises(ChannelError, match="must return a dict, but returned tuple"):
        ChannelCollator(lambda _: (1, 2))(named("a"))
    with pytest.raises(BoundaryError, match=re.escape("it holds {'pixels': [2, 3, 4]}")):
        ChannelCollator(gives(pixels=torch.zeros(2, 3, 4)))(named("a", "b"))
    strict = ChannelCollator(gives(labels=ROW), table=ChannelTable(["a"], unknown="error"))
    with pytest.raises(ChannelError, match="'b' is not in the declared table"):
        strict(named("b"))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.name == "channel_metrics" for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


def test_labels_on_padding_are_reported_once_with_the_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = {
        "labels": [[5, 5, 5, -100], [5, 5, 5, 5]],
        "attention_mask": [[1, 1, 0, 0], [1, 0, 0, 1]],
    }
    collate = ChannelCollator(gives(**batch))
    with caplog.at_level(logging.WARNING):
        collate(named("a", "b"))
        collate(named("a", "b"))
    assert len(messages(caplog)) == 1
    assert "3 labels stand on padding and are not -100" in messages(caplog)[0]


def test_targets_across_a_boundary_are_reported_once_with_the_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Row starts have no token before them; an empty sequence starts with no label of its own."""
    labels = [[5, 5, 5, 5, -100, 5], [5, 5, 5, 5, 5, 5]]
    collate = ChannelCollator(gives(labels=labels, cu_seqlens=[0, 1, 1, 3, 4, 6, 9, 12]))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            collate(named([*"abcde"], [*"fg"]))
    assert len(messages(caplog)) == 1
    assert "3 sequences start with a label that is not -100" in messages(caplog)[0]


def test_clean_batches_are_reported_as_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ChannelCollator(gives(labels=TWO_ROWS))(named("a", "b"))
        packed = gives(labels=[[5, 5, -100, 5]], position_ids=[[0, 1, 0, 1]])
        ChannelCollator(packed)(named("a", "b"))
        padded = gives(labels=[[5, 5, -100]], attention_mask=[[1, 1, 0]])
        ChannelCollator(padded)(named("a"))
    assert messages(caplog) == []
