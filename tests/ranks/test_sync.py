"""`sync` in real gloo processes: what N ranks count together is what one process counts."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import TORCH, Case, RanksOf, case
from sync_tools import CountedCollectives, Window, alone, fill

from channel_metrics import ChannelLossAccumulator, ChannelTable, sync
from channel_metrics.core.schema import TOKENS

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


STEADY = {"all_reduce": 1}


@case(TORCH, ranks=2)
def two(folder: Path) -> dict[str, Any]:
    return seen_by_this_rank()


@case(TORCH, ranks=4)
def four(folder: Path) -> dict[str, Any]:
    return seen_by_this_rank()


def seen_by_this_rank() -> dict[str, Any]:
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
    seen["groups"] = in_groups(rank, size)
    seen["mismatch"] = [reported(off if rank == 0 else 0.0) for off in (0.0, 1e-6, 0.5)]
    seen["both"] = reported(0.5)
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


@pytest.mark.parametrize("of", [two, four])
def test_ranks_together_equal_one_process(ranks_of: RanksOf, of: Case) -> None:
    ranks, world_size = ranks_of(of), of.ranks
    for i, window in enumerate(WINDOWS):
        expected = pytest.approx(alone(window[:world_size]), rel=1e-12)
        for seen in ranks:
            assert seen["computed"][i] == expected
            assert seen["names"][i] == ranks[0]["names"][i]
    first = ("a", "b", "rare")
    later = (*first, "late") if world_size == 4 else first
    assert ranks[0]["names"] == [first, later, later]
    # Names that differ between the ranks: their union, and then their rows.
    meeting = {"all_reduce": 4}
    for seen in ranks:
        assert seen["collectives"] == [meeting, meeting if world_size == 4 else STEADY, STEADY]
        assert seen["empty"] == ({}, STEADY)


@pytest.mark.parametrize("of", [two, four])
def test_random_windows_equal_one_process(ranks_of: RanksOf, of: Case) -> None:
    for seen in ranks_of(of):
        assert len(seen["random"]) == 3
        for seed, computed in enumerate(seen["random"]):
            assert computed == [pytest.approx(alone([w]), rel=1e-12) for w in drawn(seed)]


@pytest.mark.parametrize("of", [two, four])
def test_names_are_agreed_on_once(ranks_of: RanksOf, of: Case) -> None:
    for seen in ranks_of(of):
        for table, (calls, tokens) in zip(TABLES.values(), seen["agreed"], strict=True):
            windows, num_calls, order = table
            assert calls == [{"all_reduce": number} for number in num_calls]
            met = [name for window in windows for names in window[: of.ranks] for name in names]
            assert tokens == Counter(met)
            assert list(tokens) == [name for name in order if name in met]


@pytest.mark.parametrize("of", [two, four])
def test_groups_know_their_own_sums_only(ranks_of: RanksOf, of: Case) -> None:
    half = of.ranks // 2
    for rank, seen in enumerate(ranks_of(of)):
        first = rank // half * half
        own = {f"rank{i}_tokens": 1.0 for i in range(first, first + half)}
        assert seen["groups"] == {f"half{rank // half}_tokens": float(half), **own}


@pytest.mark.parametrize("of", [two, four])
def test_what_ranks_report_adds_up(ranks_of: RanksOf, of: Case) -> None:
    for seen in ranks_of(of):
        # Below the tolerance it is rounding.
        assert seen["mismatch"] == [0.0, 0.0, 0.5]
        assert seen["both"] == pytest.approx(0.5 * of.ranks)


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
