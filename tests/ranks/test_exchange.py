"""The protocol of `sync`, with any number of ranks in one process; test_sync.py has real ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import cluster
from benchmarks.lockstep import Outcome, in_lockstep
from channel_metrics import ChannelLossAccumulator, ChannelMetricsError
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.sums import COLUMNS
from channel_metrics.errors import StoppedError
from channel_metrics.ranks.agreed_names import DIGEST_SIZE, AgreedNames
from channel_metrics.ranks.exchange import GlobalSums, exchange

# One sequence of one token per entry; None is unlabeled.
Seen = list[str | None]
NAMES = ("a", "b", "c", "x y", "Z")
SEEN = st.lists(st.sampled_from([*NAMES, None]), max_size=4)


def fill(window: ChannelLossAccumulator, seen: Seen) -> None:
    losses = torch.arange(1.0, len(seen) + 1).view(-1, 1)
    window.update(losses, channels=seen)


def run(
    windows: list[ChannelLossAccumulator], guards: dict[int, FaultGuard] | None = None
) -> Outcome[GlobalSums]:
    ranks = (
        exchange(window, rank, len(windows), (guards or {}).get(rank, FaultGuard()))
        for rank, window in enumerate(windows)
    )
    return in_lockstep(ranks)


def summed(windows: list[ChannelLossAccumulator]) -> GlobalSums:
    """What all ranks come to, each on its own."""
    results = run(windows).results
    for result in results:
        assert isinstance(result, GlobalSums)
        assert result.names == results[0].names and torch.equal(result.sums, results[0].sums)
    return results[0]


def vector_bytes(num_channels: int) -> int:
    """The steady state: the rows, three numbers, and two digests of float64."""
    return 8 * (len(COLUMNS) * (num_channels + 1) + 3 + 2 * DIGEST_SIZE)


@given(st.lists(st.lists(SEEN, min_size=3, max_size=3), min_size=1, max_size=5))
def test_ranks_together_equal_one_process(seen: list[list[Seen]]) -> None:
    """Three windows per rank: tables of any content and order, ranks that have seen nothing."""
    windows = [ChannelLossAccumulator() for _ in seen]
    names: tuple[str, ...] = ()
    for number in range(3):
        oracle = ChannelLossAccumulator(names)
        for window, of_rank in zip(windows, seen, strict=True):
            fill(window.reset(), of_rank[number])
            fill(oracle, of_rank[number])
        found = summed(windows)
        names = (*names, *sorted(set(oracle.table.names) - set(names)))
        assert found.names == names
        by_name = dict(zip(oracle.table.names, oracle.sums()[1:], strict=True))
        expected = torch.stack([oracle.sums()[0], *(by_name[name] for name in names)])
        assert torch.equal(found.sums, expected)


def test_what_is_sent() -> None:
    """Equal names: their rows only, whatever the order they were met in. Then nothing more."""
    num_ranks, rows = 5, 8 * len(COLUMNS)
    windows = [ChannelLossAccumulator() for _ in range(num_ranks)]
    for rank, window in enumerate(windows):
        fill(window, list(NAMES[rank:] + NAMES[:rank]))
    assert run(windows).sent_bytes == [vector_bytes(0), 5 * rows]
    assert run(windows).sent_bytes == [vector_bytes(5)]
    for window in windows:
        window.table.add("late")
    assert run(windows).sent_bytes == [vector_bytes(5), rows]
    # `["only"]` takes one word of eight bytes, `["other"]` two.
    windows[3].table.add("only")
    assert run(windows).sent_bytes == [vector_bytes(6), num_ranks * 24, 8, rows]
    windows[0].table.add("other")
    windows[4].table.add("more")
    assert run(windows).sent_bytes == [vector_bytes(7), num_ranks * 24, 24, 2 * rows]
    assert run(windows).sent_bytes == [vector_bytes(9)]
    assert summed(windows).names == (*sorted(NAMES), "late", "only", "more", "other")


@pytest.mark.parametrize("declared", [["a", "b"], ["b", "a"], ["a"]])
def test_a_rank_that_stopped_ends_all(declared: list[str]) -> None:
    windows = [ChannelLossAccumulator(declared if rank else ()) for rank in range(3)]
    guard = FaultGuard("warn")
    with guard.guarded():
        raise ZeroDivisionError
    outcome = run(windows, {1: guard})
    assert [type(result) for result in outcome.results] == [StoppedError] * 3
    assert outcome.sent_bytes == [vector_bytes(0)]


@pytest.mark.parametrize("odd", [0, 2])
def test_names_that_are_not_shared_are_refused(odd: int) -> None:
    """Taken for agreed, in another order: their sums would be mixed up without a trace."""
    windows = [ChannelLossAccumulator(["a", "b"]) for _ in range(3)]
    for rank, window in enumerate(windows):
        window.agreed_names = AgreedNames(["b", "a"] if rank == odd else ["a", "b"])
    for result in run(windows).results:
        assert isinstance(result, ChannelMetricsError)
        assert "the same 2 names in the same order" in str(result)


@pytest.mark.parametrize("num_equal", [16_384, 16_383])
def test_16384_ranks(num_equal: int) -> None:
    """One window is shared by the ranks with equal names; each still takes part for itself."""
    num_ranks = 16_384
    shared, last = ChannelLossAccumulator(["a", "b"]), ChannelLossAccumulator(["b", "a"])
    fill(shared, ["a", "b", None])
    fill(last, ["b", "b"])
    steps = [exchange(shared, rank, num_ranks, FaultGuard()) for rank in range(num_equal)]
    steps += [exchange(last, num_equal, num_ranks, FaultGuard())] * (num_equal < num_ranks)
    outcome = in_lockstep(steps)
    # Nobody sends a name, though one rank has them in another order.
    assert outcome.sent_bytes == [vector_bytes(0), 2 * 8 * len(COLUMNS)]
    expected = (shared.sums() * num_equal)[:, 0]
    if num_equal < num_ranks:
        expected += torch.tensor([0.0, 0.0, 2.0])
    for found in (outcome.results[0], outcome.results[-1]):
        assert isinstance(found, GlobalSums) and found.names == ("a", "b")
        assert torch.equal(found.sums[:, 0], expected)


@pytest.mark.parametrize(("num_ranks", "num_channels"), [(1, 0), (2, 3), (64, 100), (300, 10)])
def test_the_arithmetic_of_many_ranks_is_that_of_the_protocol(
    num_ranks: int, num_channels: int
) -> None:
    declared = [f"channel{i}" for i in range(num_channels)]
    windows = [ChannelLossAccumulator(declared) for _ in range(num_ranks)]
    wanted = cluster.vectors(num_ranks, num_channels)
    if num_channels:
        assert run(windows).sent_bytes == wanted["first log, equal names"]
    assert run(windows).sent_bytes == wanted["log"]
    own = [f"met by rank {rank:05}" for rank in range(num_ranks)]
    if num_ranks > 1:
        windows[-1].table.add(own[-1])
        assert run(windows).sent_bytes == wanted["one new name on one rank"]
        own[-1] = "met by rank -0001"
        wanted = cluster.vectors(num_ranks, num_channels + 1)
        for window, name in zip(windows, own, strict=True):
            window.table.add(name)
        assert run(windows).sent_bytes == wanted["another new name on each rank"]
    num_agreed = len(summed(windows).names)
    for window in windows:
        window.table.add("met by all")
    wanted = cluster.vectors(num_ranks, num_agreed)
    assert run(windows).sent_bytes == wanted["one new name on all ranks"]


def test_the_network_that_is_assumed() -> None:
    """Whole numbers: 4 ranks, 100 bytes, 1 s per step, 50 bytes per second."""
    network = cluster.Network(step_seconds=1.0, bytes_per_second=50.0)
    assert network.ring(100, 4) == 6 * (1 + 0.5)
    assert network.tree(100, 4) == 4 + 4
    assert network.tree(100, 5) == 6 + 4
