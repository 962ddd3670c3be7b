"""What one log window sends: 1, 8 and 64 ranks (processes, gloo), 10 to 100,000 channels.

All ranks share the cores of one machine, so the times say how the cost grows on the host, not what
a cluster takes; the bytes and the number of collectives are those of any backend.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.timing import one_thread
from channel_metrics import ChannelLossAccumulator
from channel_metrics.core.totals import RunTotals
from channel_metrics.ranks.sync import sync

__all__ = ["host", "run"]

RANKS = (1, 8, 64)
CHANNELS = (10, 100, 1_000, 10_000, 100_000)
TIMEOUT = timedelta(seconds=300)
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast")


class _Cost(NamedTuple):
    collectives: int
    bytes: int
    milliseconds: float


def run(ranks: tuple[int, ...] = RANKS, num_rounds: int = 3) -> list[dict[str, object]]:
    """One row per number of ranks and channels, as rank 0 saw it."""
    rows: list[dict[str, object]] = []
    for num_ranks in ranks:
        rows += _simulate(num_ranks, num_rounds)
    return rows


def host(num_rounds: int = 5) -> list[dict[str, object]]:
    """What a log takes on one rank beside the network, where all channels have tokens."""
    with one_thread():
        return [_host(num_channels, num_rounds) for num_channels in CHANNELS]


def _simulate(num_ranks: int, num_rounds: int) -> list[dict[str, object]]:
    context: Any = multiprocessing.get_context("spawn" if num_ranks == 1 else "forkserver")
    if num_ranks > 1:
        context.set_forkserver_preload(["torch", "channel_metrics.ranks.sync"])
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
    rows = [_measure(num_channels, rank, num_ranks, num_rounds) for num_channels in CHANNELS]
    if rank == 0:
        results.send(rows)
    dist.barrier()
    dist.destroy_process_group()


def _measure(num_channels: int, rank: int, num_ranks: int, num_rounds: int) -> dict[str, object]:
    window = _declared(num_channels)
    names = window.table.names
    tokens = [float(num_ranks)] * num_channels
    first = _cost(window, names, tokens)
    rounds = [_cost(window, names, tokens) for _ in range(num_rounds)]
    if rank == num_ranks - 1:
        window.update(torch.ones(1, 1), channels=["met by one rank"])
    names, tokens = (*names, "met by one rank"), [*tokens, 1.0]
    one = _cost(window, names, tokens)
    own = [f"met by rank {i:05}" for i in range(num_ranks)]
    window.update(torch.ones(1, 1), channels=[own[rank]])
    everywhere = _cost(window, (*names, *own), [*tokens, *[1.0] * num_ranks])
    log = _Cost(*rounds[0][:2], statistics.median(cost.milliseconds for cost in rounds))
    return {
        "num_ranks": num_ranks,
        "num_channels": num_channels,
        "collectives_per_log": log.collectives,
        "bytes_per_log": log.bytes,
        "milliseconds": log.milliseconds,
        **_columns("first_log", first),
        **_columns("one_new_name", one),
        **_columns("new_name_per_rank", everywhere),
    }


def _columns(event: str, cost: _Cost) -> dict[str, object]:
    return {f"{event}_{field}": value for field, value in cost._asdict().items()}


def _declared(num_channels: int) -> ChannelLossAccumulator:
    """One token in each of the channels."""
    window = ChannelLossAccumulator(f"channel{i:06}" for i in range(num_channels))
    bounds = torch.arange(num_channels + 1, dtype=torch.int32)
    return window.update(
        torch.ones(num_channels), channels=torch.arange(num_channels), cu_seqlens=bounds
    )


def _cost(window: ChannelLossAccumulator, names: tuple[str, ...], tokens: list[float]) -> _Cost:
    """Of one sync, whose sums must be these names, in this order, with these tokens."""
    dist.barrier()
    with _counted() as sent:
        start = time.perf_counter()
        total = sync(window)
        seconds = time.perf_counter() - start
    assert total.table.names == names, "the names of the ranks are wrong"
    assert total.sums()[1:, 0].tolist() == tokens, "the sums of the ranks are wrong"
    return _Cost(len(sent), sum(sent), round(seconds * 1e3, 2))


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes of what is given to each collective in the block."""
    sent: list[int] = []

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(given: Any, *args: Any, **kwargs: Any) -> Any:
            sent.append(given.nbytes if isinstance(given, torch.Tensor) else 0)
            return function(given, *args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in _COLLECTIVES}
    for name, function in originals.items():
        setattr(dist, name, counting(function))
    try:
        yield sent
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def _host(num_channels: int, num_rounds: int) -> dict[str, object]:
    window = _declared(num_channels)
    total = sync(window, alone=True)
    calls: dict[str, Callable[[], object]] = {
        "sync": lambda: sync(window, alone=True),
        "compute": total.compute,
        "totals": lambda: RunTotals().add(total.table.names, total.sums()),
    }
    row: dict[str, object] = {"num_channels": num_channels}
    for name, call in calls.items():
        seconds = [_seconds(call) for _ in range(num_rounds)]
        row[f"{name}_milliseconds"] = round(statistics.median(seconds) * 1e3, 2)
    return row


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
