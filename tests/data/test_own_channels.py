"""A collator that returns channels itself."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch

from channel_metrics import ChannelCollator, ChannelError, ChannelTable


def given_batch(batch: dict[str, Any], records: Any) -> dict[str, Any]:
    return dict(batch)


def test_a_collator_that_returns_channels_itself() -> None:
    """Names or ids, whatever the records say, and boundaries where rows are not sequences."""
    table = ChannelTable(["a", "b"])
    records: list[Any] = [(1, 2), (3, 4)]
    tokens = torch.ones(1, 6, dtype=torch.int64)
    packed = {"input_ids": tokens, "cu_seqlens": torch.tensor([0, 1, 3, 6])}
    bounds = torch.tensor([0, 1, 3, 6], dtype=torch.int32)
    for given in (["b", None, "a"], torch.tensor([1, -1, 0])):
        for base in (
            {**packed, "channels": given},
            {"input_ids": tokens, "channel_bounds": bounds, "channels": given},
        ):
            collate = ChannelCollator(dict, table=table, bounds_key="channel_bounds")
            batch = collate.around(partial(given_batch, base))(records)
            assert batch["channels"].tolist() == [1, -1, 0]
            assert batch["channel_bounds"].tolist() == [0, 1, 3, 6]
    rows = {"input_ids": tokens.view(3, 2), "channels": ["new", "a", "b"]}
    batch = ChannelCollator(lambda _: rows, table=table)([{"channel": "ignored"}])
    assert batch["channels"] == ["new", "a", "b"]


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (["a", "b"], "name 2 channels but the batch holds 3 sequences"),
        (torch.tensor([0, 1, 0, 1]), "name 4 channels but the batch holds 3 sequences"),
        (torch.tensor([0, 1, 2]), "-1 (unlabeled) or 0 to 1, but range from 0 to 2"),
        (torch.zeros(3, 2, dtype=torch.int64), "one per sequence, but gave [3, 2]"),
        (torch.zeros(3), "one per sequence, but gave [3]"),
        ({"a": 1}, "one per sequence, but gave dict"),
    ],
)
def test_channels_of_a_collator_are_checked(channels: Any, message: str) -> None:
    batch = {"input_ids": torch.ones(3, 2, dtype=torch.int64), "channels": channels}
    with pytest.raises(ChannelError, match=re.escape(message)):
        ChannelCollator(lambda _: batch, table=ChannelTable(["a", "b"]))([{}])
