"""`sync` in real gloo processes: what N ranks count together is what one process counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from channel_metrics import ChannelError, ChannelLossAccumulator, sync
from channel_metrics.errors import StoppedError
from channel_metrics.faults import FaultGuard
from channel_metrics.metrics import WINDOW_METRICS

Window = list[tuple[list[str | None], list[float]]]  # micro-batches of (channels, losses)

# What each of four ranks sees in three windows. Tables come out in different orders; "rare" is
# on one rank only; rank 3 has no batch in the first window; "late" is new in the second.
WINDOWS: list[list[Window]] = [
    [
        [(["a", "b"], [1.0, 2.0])],
        [(["b", "a"], [3.0, 4.0]), (["rare", None], [5.0, 6.0])],
        [(["a", None], [7.0, float("nan")])],
        [],
    ],
    [
        [(["b", "b"], [0.25, 0.5])],
        [],
        [(["late", "a"], [8.0, 9.0])],
        [(["late", "b"], [1.5, 2.5])],
    ],
    [[(["a", "rare"], [float(rank), 0.125])] for rank in range(4)],
]


def fill(accumulator: ChannelLossAccumulator, window: Window) -> None:
    for channels, losses in window:
        rows = torch.tensor(losses).view(-1, 1)
        correct = torch.tensor(losses).view(-1, 1) > 2
        accumulator.update(rows, channels=channels, correct=correct, weights=rows.nan_to_num() + 1)


def alone(windows: list[Window]) -> dict[str, float]:
    accumulator = ChannelLossAccumulator(metrics=WINDOW_METRICS)
    for window in windows:
        fill(accumulator, window)
    return accumulator.compute()


class CountedCollectives:
    """Counts the calls of torch.distributed functions that talk to other ranks."""

    NAMES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier",
             "all_gather_into_tensor", "broadcast_object_list", "gather_object")  # fmt: skip

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        for name in self.NAMES:
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, int]:
        taken, self.calls = dict(self.calls), Counter()
        return taken


def ranks_sync() -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    collectives = CountedCollectives()
    accumulator = ChannelLossAccumulator(metrics=WINDOW_METRICS)
    seen: dict[str, Any] = {"computed": [], "names": [], "collectives": []}
    for window in WINDOWS:
        fill(accumulator, window[rank])
        before = accumulator.sums()
        total = sync(accumulator)
        seen["computed"].append(total.compute())
        seen["names"].append(total.table.names)
        seen["collectives"].append(collectives.take())
        assert torch.equal(accumulator.sums(), before)
        accumulator.reset()
    seen["empty"] = (sync(accumulator).compute(), collectives.take())
    seen["groups"] = in_groups(rank, size)
    seen["mismatch"] = [reported(off if rank == 0 else 0.0) for off in (0.0, 1e-6, 0.5)]
    seen["both"] = reported(0.5)
    seen["colliding"] = colliding_names(rank)
    seen["stopped"] = [stopped_rank(rank, place, collectives) for place in ("before", "inside")]
    return seen


def stopped_rank(rank: int, place: str, collectives: CountedCollectives) -> tuple[bool, Any]:
    """Rank 1 has stopped before the sync, or stops while it reads its sums; others go on."""
    accumulator = ChannelLossAccumulator(["old"])
    sync(accumulator)
    guard = FaultGuard("warn")
    # New names, which cost more collectives where all ranks measure.
    fill(accumulator, [([f"of{rank}", "old"], [1.0, 2.0])])
    if rank == 1 and place == "before":
        with guard.guarded():
            raise ZeroDivisionError
    if rank == 1 and place == "inside":
        accumulator.sums = None  # type: ignore[assignment, method-assign]
    collectives.take()
    with guard.guarded():
        sync(accumulator, guard=guard)
    return guard.off, collectives.take()


def in_groups(rank: int, size: int) -> dict[str, float]:
    """Two groups of half the ranks each: each knows only its own sums and names."""
    half = size // 2
    groups = [dist.new_group(list(range(i * half, (i + 1) * half))) for i in range(2)]
    accumulator = ChannelLossAccumulator(metrics=["tokens"])
    fill(accumulator, [([f"half{rank // half}"], [1.0])])
    return sync(accumulator, groups[rank // half]).compute()


def reported(off: float) -> float:
    """The mismatch of all ranks, where this one is off by the relative difference `off`."""
    accumulator = ChannelLossAccumulator()
    losses = torch.ones(4, dtype=torch.float64)
    reported_sum = torch.tensor(4 * (1 - off), dtype=torch.float64)
    accumulator.update(losses, channels=["a"], reported_sum=reported_sum)
    return sync(accumulator).mismatch()


def colliding_names(rank: int) -> str:
    accumulator = ChannelLossAccumulator()
    fill(accumulator, [([["x y", "x_y"][rank % 2]], [1.0])])
    with pytest.raises(ChannelError) as refused:
        sync(accumulator)
    return str(refused.value)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_equal_one_process(world_size: int) -> None:
    ranks = run_ranks(ranks_sync, world_size)
    for i, window in enumerate(WINDOWS):
        expected = pytest.approx(alone(window[:world_size]), rel=1e-12)
        for seen in ranks:
            assert seen["computed"][i] == expected
            assert seen["names"][i] == ranks[0]["names"][i]
    first = ("a", "b", "rare")
    later = (*first, "late") if world_size == 4 else first
    assert ranks[0]["names"] == [first, later, later]
    steady = {"all_reduce": 1}
    meeting = {"all_reduce": 2, "all_gather_object": 1}
    for rank, seen in enumerate(ranks):
        assert seen["collectives"] == [meeting, meeting if world_size == 4 else steady, steady]
        assert seen["empty"] == ({}, steady)
        half = world_size // 2
        assert seen["groups"] == {f"half{rank // half}_tokens": float(half)}
        # Below the tolerance it is rounding; what several ranks report adds up.
        assert seen["mismatch"] == [0.0, 0.0, 0.5]
        assert seen["both"] == pytest.approx(0.5 * world_size)
        assert "would both be logged as 'x_y'" in seen["colliding"]
        # A rank that stopped keeps nobody waiting: all are off after one all-reduce.
        assert seen["stopped"] == [(True, steady)] * 2
    assert len({seen["colliding"] for seen in ranks}) == 1


def fails_on_rank_one() -> int:
    if dist.get_rank() == 1:
        raise RuntimeError("rank one gives up")
    return dist.get_rank()


def test_the_spawner_reports_the_rank_that_failed() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:\n(.|\n)*rank one gives up"):
        run_ranks(fails_on_rank_one, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_process(dtype: torch.dtype) -> None:
    accumulator = ChannelLossAccumulator(["b"], metrics=WINDOW_METRICS, dtype=dtype)
    accumulator.table.key_format = "{metric}/{channel}"
    for window in WINDOWS[0]:
        fill(accumulator, window)
    total = sync(accumulator)
    assert total is not accumulator
    assert "loss/b" in total.compute()
    assert total.compute() == accumulator.compute()
    assert torch.equal(total.sums(), accumulator.sums())
    accumulator.reset()
    assert total.compute() != {}
    assert [reported(off) for off in (0.0, 1e-6, 0.5)] == pytest.approx([0.0, 0.0, 0.5])


def test_a_stopped_process_alone_stops_without_a_group() -> None:
    guard = FaultGuard("warn")
    for _ in range(2):
        with guard.guarded():
            raise ZeroDivisionError
    with pytest.raises(StoppedError, match="had an error in the metrics"):
        sync(ChannelLossAccumulator(), guard=guard)
