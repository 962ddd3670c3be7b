"""`ChannelCollator` in the worker processes of a DataLoader.

In a module of its own, since every worker imports it; a fork server imports torch once for all.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from channel_metrics import ChannelCollator, ChannelTable

RECORDS = [{"input_ids": [i, i], "channel": f"c{i}"} for i in range(6)]


class Stream(IterableDataset[dict[str, Any]]):
    """The records, shared out over the workers."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        assert worker is not None
        yield from RECORDS[worker.id :: worker.num_workers]


def stack(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([feature["input_ids"] for feature in features])}


@pytest.mark.parametrize("data", [RECORDS, Stream()], ids=["map", "iterable"])
def test_workers(data: Any) -> None:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch"])
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_size=2,
        num_workers=2,
        collate_fn=ChannelCollator(stack, table=ChannelTable(["c0", "c1", "c2", "c3"])),
        multiprocessing_context=server,
    )
    seen: dict[int, str] = {}
    for batch in loader:
        channels = batch["channels"]
        # c4 and c5 are new: a worker must not give them ids that nobody else knows.
        assert isinstance(channels, list) == bool(batch["input_ids"].max() > 3)
        names = channels if isinstance(channels, list) else [f"c{i}" for i in channels.tolist()]
        assert batch["cu_seqlens"].tolist() == [2 * i for i in range(len(names) + 1)]
        seen |= dict(zip(batch["input_ids"][:, 0].tolist(), names, strict=True))
    assert seen == {i: f"c{i}" for i in range(6)}
