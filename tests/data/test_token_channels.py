"""Records that list a channel per token: mixed blocks, as run_clm's `group_texts` makes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from collator_tools import left, longest_first, padded
from reference import Batch, reference_metrics
from transformers import DataCollatorWithFlattening, default_data_collator

from channel_metrics import ChannelCollator, ChannelError, ChannelLossAccumulator

Record = dict[str, Any]

BLOCKS: list[Record] = [
    {"input_ids": [11, 12, 13, 14, 15], "channel": ["a", "a", "b", "b", "a"]},
    {"input_ids": [21, 22, 23, 24, 25], "channel": ["a", None, None, "c", "c"]},
]
UNEVEN: list[Record] = [*BLOCKS, {"input_ids": [31, 32], "channel": ["c", "b"]}]


def expected(records: list[Record]) -> dict[str, float]:
    """Every token by itself, under its own channel; its loss is its number."""
    tokens = [
        Batch([float(token)], [channel], [0, 1])
        for record in records
        for token, channel in zip(record["input_ids"], record["channel"], strict=True)
    ]
    values = reference_metrics(tokens)
    return {key: value for key, value in values.items() if key.endswith(("_loss", "_tokens"))}


@pytest.mark.parametrize(
    ("base", "records"),
    [
        (default_data_collator, BLOCKS),
        (padded, UNEVEN),
        (left, UNEVEN),
        (longest_first, UNEVEN[::-1]),
        (DataCollatorWithFlattening(), UNEVEN),
    ],
)
def test_each_token_has_its_channel(
    base: Any, records: list[Record], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        batch = ChannelCollator(base)(records)
    assert caplog.records == []
    metrics = ChannelLossAccumulator(metrics=["loss", "tokens"])
    metrics.update(
        batch["input_ids"].double(),
        channels=batch["channels"],
        cu_seqlens=batch["cu_seqlens"],
        loss_mask=batch["input_ids"] != 0,
    )
    assert metrics.compute() == pytest.approx(expected(records))


def test_each_run_of_a_channel_is_a_sequence() -> None:
    batch = ChannelCollator(default_data_collator)(BLOCKS)
    assert batch["channels"] == ["a", "b", "a", "a", None, "c"]
    assert batch["cu_seqlens"].tolist() == [0, 2, 4, 5, 6, 8, 10]


def test_a_record_of_one_channel_may_stand_among_them() -> None:
    batch = ChannelCollator(default_data_collator)([BLOCKS[0], {**BLOCKS[1], "channel": "z"}])
    assert batch["channels"] == ["a", "b", "a", "z"]
    assert batch["cu_seqlens"].tolist() == [0, 2, 4, 5, 10]


def test_a_collator_that_cuts_tokens_is_refused() -> None:
    def cut(records: list[Record]) -> Any:
        return padded([{"input_ids": record["input_ids"][:3]} for record in records])

    with pytest.raises(ChannelError, match="each of its 5 tokens, but the batch holds 3 of them"):
        ChannelCollator(cut)(BLOCKS)
