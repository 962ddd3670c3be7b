"""`sync` in real gloo processes: what N ranks count together is what one process counts."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from channel_metrics import (
    ChannelError,
    ChannelLossAccumulator,
    ChannelMetricsError,
    ChannelTable,
    sync,
)
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.schema import TOKENS, Column
from channel_metrics.errors import CollectiveError, StoppedError
from channel_metrics.ranks.agreed_names import AgreedNames, Agreement
from channel_metrics.ranks.sync import sum_over_ranks

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


# Names that each of four ranks meets in three windows, and the all-reduces of each window: one;
# one more before the first; one more for the rows of names that are new later on; two more for
# the union of names that are not the same on all ranks. Then the names of all windows, as all
# ranks of four order them.
Names = list[str]
TABLES: dict[str, tuple[list[list[Names]], list[int], list[str]]] = {
    "equal": ([[["b", "a"]] * 4] * 3, [2, 1, 1], ["a", "b"]),
    "in another order": (
        [[["b", "a", "c"], ["c", "a", "b"]] * 2, [["a"], ["c", "b"]] * 2, [["b"]] * 4],
        [2, 1, 1],
        ["a", "b", "c"],
    ),
    "different": ([[["b"], ["a"], ["d"], ["c"]], [["a"], ["b"]] * 2, [[]] * 4],
                  [4, 1, 1], ["a", "b", "c", "d"]),
    "none at one rank": ([[["b"], []] * 2, [["a"], []] * 2, [[], ["b", "a"]] * 2],
                         [4, 4, 1], ["b", "a"]),
    "growing": ([[["m"]] * 4, [["z", "m"], ["m", "z"]] * 2, [["a"], ["m", "b"]] * 2],
                [2, 2, 4], ["m", "z", "a", "b"]),
}  # fmt: skip


def fill(accumulator: ChannelLossAccumulator, window: Window) -> None:
    for channels, losses in window:
        rows = torch.tensor(losses).view(-1, 1)
        correct = torch.tensor(losses).view(-1, 1) > 2
        accumulator.update(rows, channels=channels, correct=correct, weights=rows.nan_to_num() + 1)


def alone(windows: list[Window]) -> dict[str, float]:
    accumulator = ChannelLossAccumulator(metrics=TOKENS.window_metrics)
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
    accumulator = ChannelLossAccumulator(metrics=TOKENS.window_metrics)
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
    seen["agreed"] = [agreeing(table, rank, collectives) for table in TABLES]
    seen["random"] = [random_windows(seed, rank, size) for seed in range(3)]
    seen["unequal"] = unequal_order(rank, collectives)
    seen["groups"] = in_groups(rank, size)
    seen["mismatch"] = [reported(off if rank == 0 else 0.0) for off in (0.0, 1e-6, 0.5)]
    seen["both"] = reported(0.5)
    seen["colliding"] = colliding_names(rank)
    seen["columns"] = other_columns(rank, collectives)
    seen["failing"] = failing_collective()
    seen["stopped"] = [stopped_rank(rank, place, collectives) for place in ("before", "inside")]
    return seen


def agreeing(name: str, rank: int, collectives: CountedCollectives) -> Any:
    """Collectives per window, and {name: tokens} in the last, in the order of the names."""
    accumulator = ChannelLossAccumulator(metrics=["tokens"])
    collectives.take()
    calls = []
    for names in TABLES[name][0]:
        for channel in names[rank]:
            fill(accumulator, [([channel], [1.0])])
        total = sync(accumulator)
        calls.append(collectives.take())
    return calls, dict(zip(total.table.names, total.sums()[1:, 0].tolist(), strict=True))


def random_windows(seed: int, rank: int, size: int) -> list[dict[str, float]]:
    """What is computed in six windows, in which this rank counts its part of random batches."""
    accumulator = ChannelLossAccumulator(metrics=TOKENS.window_metrics)
    computed = []
    for window in drawn(seed):
        fill(accumulator.reset(), [batch for i, batch in enumerate(window) if i % size == rank])
        computed.append(sync(accumulator).compute())
    return computed


def drawn(seed: int) -> list[Window]:
    """Six windows of up to six batches, with more and more names."""
    rng = random.Random(seed)
    known = [[*map(str, range(2 * window + 1)), None] for window in range(6)]
    return [
        [(rng.choices(names, k=2), [rng.random(), rng.random()]) for _ in range(rng.randrange(7))]
        for names in known
    ]


def unequal_order(rank: int, collectives: CountedCollectives) -> tuple[str, dict[str, int]]:
    """The ranks take the same names for agreed, but not in the same order."""
    accumulator = ChannelLossAccumulator(["a", "b"])
    agreement = Agreement()
    agreement.columns = accumulator.columns
    agreement.names = AgreedNames(["b", "a"] if rank == 1 else ["a", "b"])
    collectives.take()
    with pytest.raises(ChannelMetricsError) as refused:
        sum_over_ranks(accumulator, agreement)
    return str(refused.value), collectives.take()


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


def other_columns(rank: int, collectives: CountedCollectives) -> tuple[str, dict[str, int]]:
    """Rank 1 has registered a column of its own."""
    schema = TOKENS.extended(Column("easy", "tokens", "")) if rank == 1 else TOKENS
    accumulator = ChannelLossAccumulator(["a"], schema=schema)
    collectives.take()
    with pytest.raises(ChannelMetricsError) as refused:
        sync(accumulator)
    return str(refused.value), collectives.take()


def failing_collective() -> bool:
    """It is raised whatever the errors of the metrics do: the ranks are out of step."""
    guard = FaultGuard("warn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", _broken)
        with pytest.raises(CollectiveError) as raised, guard.guarded():
            sync(ChannelLossAccumulator(["a"]), guard=guard)
    assert "the all-reduce of the channel sums failed (connection lost)" in str(raised.value)
    return guard.measuring


def _broken(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("connection lost")


def in_groups(rank: int, size: int) -> dict[str, float]:
    """Two groups of half the ranks each: each knows its own sums and names only."""
    half = size // 2
    groups = [dist.new_group(list(range(i * half, (i + 1) * half))) for i in range(2)]
    accumulator = ChannelLossAccumulator(metrics=["tokens"])
    fill(accumulator, [([f"half{rank // half}", f"rank{rank}"], [1.0, 1.0])])
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
    # Names that differ between the ranks: their union, and then their rows.
    meeting = {"all_reduce": 4}
    for rank, seen in enumerate(ranks):
        assert seen["collectives"] == [meeting, meeting if world_size == 4 else steady, steady]
        assert seen["empty"] == ({}, steady)
        check_agreed(seen["agreed"], world_size)
        for seed, computed in enumerate(seen["random"]):
            assert computed == [pytest.approx(alone([w]), rel=1e-12) for w in drawn(seed)]
        assert "in the same order" in seen["unequal"][0] and seen["unequal"][1] == steady
        half = world_size // 2
        first_of_half = rank // half * half
        own = {f"rank{i}_tokens": 1.0 for i in range(first_of_half, first_of_half + half)}
        assert seen["groups"] == {f"half{rank // half}_tokens": float(half), **own}
        # Below the tolerance it is rounding; what several ranks report adds up.
        assert seen["mismatch"] == [0.0, 0.0, 0.5]
        assert seen["both"] == pytest.approx(0.5 * world_size)
        assert "would both be logged as 'x_y'" in seen["colliding"]
        assert "expected the same columns on all ranks" in seen["columns"][0]
        assert seen["columns"][1] == steady and seen["failing"]
        # A rank that stopped keeps nobody waiting: all are off after one all-reduce.
        assert seen["stopped"] == [(True, steady)] * 2
    assert len({seen["colliding"] for seen in ranks}) == 1


def check_agreed(found: list[Any], world_size: int) -> None:
    for (windows, num_calls, order), (calls, tokens) in zip(TABLES.values(), found, strict=True):
        assert calls == [{"all_reduce": number} for number in num_calls]
        seen = [name for window in windows for names in window[:world_size] for name in names]
        assert tokens == Counter(seen)
        assert list(tokens) == [name for name in order if name in seen]


def fails_on_rank_one() -> int:
    if dist.get_rank() == 1:
        raise RuntimeError("rank one gives up")
    return dist.get_rank()


def test_the_spawner_reports_the_rank_that_failed() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:\n(.|\n)*rank one gives up"):
        run_ranks(fails_on_rank_one, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_process(dtype: torch.dtype) -> None:
    table = ChannelTable(["b"], key_format="{metric}/{channel}")
    accumulator = ChannelLossAccumulator(table, metrics=TOKENS.window_metrics, dtype=dtype)
    for window in WINDOWS[0]:
        fill(accumulator, window)
    total = sync(accumulator)
    assert total is not accumulator
    assert "loss/b" in total.compute()
    assert total.compute() == accumulator.compute()
    assert torch.equal(total.sums(), accumulator.sums())
    assert list(total.compute_by_channel()) == ["b", "a", "rare", "unlabeled"]
    total.table.add("of the sums only")
    assert accumulator.table.names == ("b", "a", "rare")
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
