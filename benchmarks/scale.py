"""What one log window sends: 1 and 8 ranks (processes, gloo), 10 to 100,000 channels.

All ranks share the cores of one machine, so the times say how the cost grows on the host, not what
a cluster takes; the bytes and the number of collectives are those of any backend.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from channel_metrics import ChannelLossAccumulator
from channel_metrics.sync import sync

__all__ = ["run"]

RANKS = (1, 8)
CHANNELS = (10, 100, 1_000, 10_000, 100_000)
# Agreeing on names sends the names of every rank to every rank: ranks x ranks x channels.
MAX_NEW = 10_000
TIMEOUT = timedelta(seconds=300)


def run(ranks: tuple[int, ...] = RANKS, num_rounds: int = 3) -> list[dict[str, object]]:
    """One row per number of ranks and channels, as rank 0 saw it."""
    rows: list[dict[str, object]] = []
    for num_ranks in ranks:
        rows += _simulate(num_ranks, num_rounds)
    return rows


def _simulate(num_ranks: int, num_rounds: int) -> list[dict[str, object]]:
    context: Any = multiprocessing.get_context("spawn" if num_ranks == 1 else "forkserver")
    if num_ranks > 1:
        context.set_forkserver_preload(["torch", "channel_metrics.sync"])
    with tempfile.TemporaryDirectory() as folder:
        receiving, sending = context.Pipe(duplex=False)
        processes = [
            context.Process(
                target=_rank, args=(rank, num_ranks, folder, num_rounds, sending), daemon=True
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        try:
            if not receiving.poll(TIMEOUT.total_seconds()):
                raise TimeoutError(f"{num_ranks} ranks did not end in {TIMEOUT}")
            rows: list[dict[str, object]] = receiving.recv()
        finally:
            for process in processes:
                process.join(timeout=20)
                process.kill()
    return rows


def _rank(rank: int, num_ranks: int, folder: str, num_rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=TIMEOUT,
    )
    rows = [_measure(num_channels, num_ranks, num_rounds) for num_channels in CHANNELS]
    if rank == 0:
        results.send(rows)
    dist.barrier()
    dist.destroy_process_group()


def _measure(num_channels: int, num_ranks: int, num_rounds: int) -> dict[str, object]:
    names = [f"channel{i:06}" for i in range(num_channels)]
    window = ChannelLossAccumulator(names)
    ids = torch.arange(num_channels)
    window.update(torch.ones(num_channels), channels=ids, cu_seqlens=_bounds(num_channels))
    agreeing = None
    if num_channels * num_ranks <= MAX_NEW * 8:
        agreeing = _seconds(window)
    # As it is from the second log on.
    window.agreed_names = tuple(names)
    sent: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        seconds = [_seconds(window) for _ in range(num_rounds)]
    finally:
        dist.all_reduce = original
    total = sync(window).sums()
    assert total[1:, 0].eq(num_ranks).all(), "the sums of the ranks are wrong"
    return {
        "num_ranks": num_ranks,
        "num_channels": num_channels,
        "collectives_per_log": len(sent) / num_rounds,
        "bytes_per_log": sent[-1],
        "milliseconds": round(statistics.median(seconds) * 1e3, 2),
        "milliseconds_agreeing_on_names": None if agreeing is None else round(agreeing * 1e3, 2),
    }


def _seconds(window: ChannelLossAccumulator) -> float:
    dist.barrier()
    start = time.perf_counter()
    sync(window)
    return time.perf_counter() - start


def _bounds(num_sequences: int) -> torch.Tensor:
    return torch.arange(num_sequences + 1, dtype=torch.int32)
