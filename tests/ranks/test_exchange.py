"""The protocol of `sync`, with any number of ranks in one process; test_sync.py has real ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import cluster
from benchmarks.lockstep import Outcome, in_lockstep
from channel_metrics import ChannelLossAccumulator, ChannelMetricsError
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.schema import TOKENS, Column
from channel_metrics.core.table import SumTable
from channel_metrics.errors import StoppedError
from channel_metrics.ranks.agreed_names import DIGEST_SIZE, AgreedNames, Agreement
from channel_metrics.ranks.exchange import GlobalSums, exchange

# One sequence of one token per entry; None is unlabeled.
Seen = list[str | None]
NAMES = ("a", "b", "c", "x y", "Z")
SEEN = st.lists(st.sampled_from([*NAMES, None]), max_size=4)


def fill(window: SumTable, seen: Seen) -> None:
    assert isinstance(window, ChannelLossAccumulator)
    losses = torch.arange(1.0, len(seen) + 1).view(-1, 1)
    window.update(losses, channels=seen)


def results_of(outcome: Outcome[GlobalSums]) -> list[GlobalSums]:
    """After a look that no rank has failed."""
    results = [result for result in outcome.results if isinstance(result, GlobalSums)]
    assert len(results) == len(outcome.results)
    return results


class Group:
    """Ranks with a window each; what they agreed on stays from one run to the next."""

    def __init__(self, windows: Sequence[SumTable]) -> None:
        self.windows = windows
        self.agreements = [Agreement() for _ in windows]
        self.guards = [FaultGuard() for _ in windows]
        self.beside: Sequence[SumTable | None] = [None] * len(windows)

    def run(self, riders: Sequence[Sequence[float]] = ()) -> Outcome[GlobalSums]:
        size = len(self.windows)
        ranks = (
            exchange(
                window,
                self.agreements[rank],
                self.guards[rank],
                rank=rank,
                num_ranks=size,
                riders=riders[rank] if riders else (),
                beside=self.beside[rank],
            )
            for rank, window in enumerate(self.windows)
        )
        return in_lockstep(ranks)

    def sent_bytes(self) -> list[int]:
        """After a look that no rank has failed."""
        outcome = self.run()
        results_of(outcome)
        return outcome.sent_bytes

    def summed(self) -> GlobalSums:
        """What all ranks come to, each on its own."""
        first, *others = results_of(self.run())
        for result in others:
            assert result.names == first.names and torch.equal(result.sums, first.sums)
        return first


def group_of(num_ranks: int, names: Iterable[str] = ()) -> Group:
    names = list(names)
    return Group([ChannelLossAccumulator(names) for _ in range(num_ranks)])


# The very first vector: whether a rank has stopped, and two digests of float64.
FIRST = 8 * (1 + 2 * DIGEST_SIZE)
NUM_COLUMNS = 9


def vector_bytes(num_channels: int, num_riders: int = 0) -> int:
    """The steady state: the rows, the riders, three numbers, and two digests of float64."""
    return 8 * (NUM_COLUMNS * (num_channels + 1) + num_riders + 3 + 2 * DIGEST_SIZE)


@given(st.lists(st.lists(SEEN, min_size=3, max_size=3), min_size=1, max_size=5))
def test_ranks_together_equal_one_process(seen: list[list[Seen]]) -> None:
    """Three windows per rank: tables of any content and order, ranks that have seen nothing."""
    group = group_of(len(seen))
    names: tuple[str, ...] = ()
    for number in range(3):
        oracle = ChannelLossAccumulator(names)
        for window, of_rank in zip(group.windows, seen, strict=True):
            fill(window.reset(), of_rank[number])
            fill(oracle, of_rank[number])
        found = group.summed()
        names = (*names, *sorted(set(oracle.table.names) - set(names)))
        assert found.names == names
        by_name = dict(zip(oracle.table.names, oracle.sums()[1:], strict=True))
        expected = torch.stack([oracle.sums()[0], *(by_name[name] for name in names)])
        assert torch.equal(found.sums, expected)


def test_what_is_sent() -> None:
    """Equal names: nothing of them, whatever the order they were met in. New ones: their rows."""
    num_ranks, rows = 5, 8 * NUM_COLUMNS
    group = Group([ChannelLossAccumulator(NAMES[rank:] + NAMES[:rank]) for rank in range(5)])
    windows = group.windows
    assert group.sent_bytes() == [FIRST, vector_bytes(5)]
    assert group.sent_bytes() == [vector_bytes(5)]
    for window in windows:
        window.labels.add("late")
    assert group.sent_bytes() == [vector_bytes(5), rows]
    # `["only"]` takes one word of eight bytes, `["other"]` two.
    windows[3].labels.add("only")
    assert group.sent_bytes() == [vector_bytes(6), num_ranks * 24, 8, rows]
    windows[0].labels.add("other")
    windows[4].labels.add("more")
    assert group.sent_bytes() == [vector_bytes(7), num_ranks * 24, 24, 2 * rows]
    assert group.sent_bytes() == [vector_bytes(9)]
    assert group.summed().names == (*sorted(NAMES), "late", "only", "more", "other")


def test_a_first_sync_with_different_names() -> None:
    group = group_of(3)
    group.windows[1].labels.add("only")
    assert group.sent_bytes() == [FIRST, 3 * 24, 8, vector_bytes(1)]
    assert group.sent_bytes() == [vector_bytes(1)]
    assert group_of(3).sent_bytes() == [FIRST, vector_bytes(0)]


@pytest.mark.parametrize("met_before", [True, False])
@pytest.mark.parametrize("declared", [["a", "b"], ["b", "a"], ["a"]])
def test_a_rank_that_stopped_ends_all(declared: list[str], met_before: bool) -> None:
    group = Group([ChannelLossAccumulator(declared if rank else ()) for rank in range(3)])
    if met_before:
        group.run()
    group.guards[1] = FaultGuard("warn")
    with group.guards[1].guarded():
        raise ZeroDivisionError
    outcome = group.run()
    assert [type(result) for result in outcome.results] == [StoppedError] * 3
    assert outcome.sent_bytes == ([vector_bytes(len(declared))] if met_before else [FIRST])


@pytest.mark.parametrize("odd", [0, 2])
def test_ranks_with_other_columns_are_refused_before_any_sums(odd: int) -> None:
    """Also where the number of columns is the same, so that the vectors would fit."""
    usual = ("tokens", "nll")
    for other in (("tokens", "loss"), ("nll", "tokens"), ("tokens", "nll", "more"), ("tokens",)):
        columns = [other if rank == odd else usual for rank in range(3)]
        group = Group([SumTable(LabelTable(["a"]), of_rank) for of_rank in columns])
        for _ in range(2):
            outcome = group.run()
            assert outcome.sent_bytes == [FIRST]
            for of_rank, result in zip(columns, outcome.results, strict=True):
                assert isinstance(result, ChannelMetricsError)
                assert "expected the same columns on all ranks" in str(result)
                assert f"(here: {', '.join(of_rank)})" in str(result)


def test_columns_that_one_rank_registers() -> None:
    schema = TOKENS.extended(Column("easy", "tokens", ""))
    group = Group([ChannelLossAccumulator(), ChannelLossAccumulator(schema=schema)])
    assert [type(result) for result in group.run().results] == [ChannelMetricsError] * 2


def test_riders_are_added_up_beside_the_sums() -> None:
    group = group_of(3, ["a"])
    fill(group.windows[0], ["a", "new", None])
    for first in (True, False):
        outcome = group.run([[0.5, rank] for rank in range(3)])
        # `["a","new"]` and `["a"]`, in words of eight bytes.
        vectors = [FIRST, 3 * 24, 16 + 8] if first else []
        assert outcome.sent_bytes == [*vectors, vector_bytes(2, num_riders=2)]
        for result in outcome.results:
            assert isinstance(result, GlobalSums)
            assert (result.riders, result.names) == ((1.5, 3.0), ("a", "new"))
            assert result.sums[:, 0].tolist() == [1, 1, 1]
    group.windows[1].labels.add("late")
    outcome = group.run([[1.0]] * 3)
    assert [result.riders for result in results_of(outcome)] == [(3.0,)] * 3


def test_a_second_table_travels_in_the_same_vectors() -> None:
    """Its rows are those of the first one; it may be left out of a sync."""
    group = group_of(3, ["a"])
    tables = [SumTable(window.labels, ("x", "y")) for window in group.windows]
    fill(group.windows[0], ["a", "new", None])
    for rank, table in enumerate(tables):
        table.add(["a"], {"x": torch.tensor([1.0]), "y": torch.tensor([float(rank)])})
    assert results_of(group.run())[0].beside is None
    group.beside = tables
    row, header = 8 * (NUM_COLUMNS + 2), vector_bytes(0) - 8 * NUM_COLUMNS
    outcome = group.run()
    assert outcome.sent_bytes == [3 * row + header]
    for found in results_of(outcome):
        assert found.sums[:, 0].tolist() == [1, 1, 1]
        assert found.beside is not None and found.beside.tolist() == [[0, 0], [3, 3], [0, 0]]
    tables[1].add(["late"], {"x": torch.tensor([5.0])})
    outcome = group.run()
    assert (outcome.sent_bytes[0], outcome.sent_bytes[-1]) == (3 * row + header, row)
    for found in results_of(outcome):
        assert found.sums.shape == (4, NUM_COLUMNS)
        assert found.beside is not None and found.beside[-1].tolist() == [5, 0]


def test_a_second_table_that_one_rank_lacks_is_refused() -> None:
    group = group_of(2, ["a"])
    group.beside = [SumTable(group.windows[0].labels, ("x",)), None]
    for result in group.run().results:
        assert "expected the same columns on all ranks" in str(result)


@pytest.mark.parametrize("odd", [0, 2])
def test_names_that_are_not_shared_are_refused(odd: int) -> None:
    """Taken for agreed, in another order: their sums would be mixed up without a trace."""
    group = group_of(3, ["a", "b"])
    for rank, agreement in enumerate(group.agreements):
        agreement.columns = TOKENS.column_names
        agreement.names = AgreedNames(["b", "a"] if rank == odd else ["a", "b"])
    for result in group.run().results:
        assert isinstance(result, ChannelMetricsError)
        assert "the same 2 names in the same order" in str(result)


@pytest.mark.parametrize("num_equal", [16_384, 16_383])
def test_16384_ranks(num_equal: int) -> None:
    """One window is shared by the ranks with equal names; each still takes part for itself."""
    num_ranks = 16_384
    shared, last = ChannelLossAccumulator(["a", "b"]), ChannelLossAccumulator(["b", "a"])
    fill(shared, ["a", "b", None])
    fill(last, ["b", "b"])
    outcome = Group([shared] * num_equal + [last] * (num_ranks - num_equal)).run()
    # Nobody sends a name, though one rank has them in another order.
    assert outcome.sent_bytes == [FIRST, vector_bytes(2)]
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
    group = group_of(num_ranks, declared)
    windows = group.windows
    wanted = cluster.vectors(num_ranks, num_channels)
    assert group.sent_bytes() == wanted["first log, equal names"]
    assert group.sent_bytes() == wanted["log"]
    own = [f"met by rank {rank:05}" for rank in range(num_ranks)]
    if num_ranks > 1:
        windows[-1].labels.add(own[-1])
        assert group.sent_bytes() == wanted["one new name on one rank"]
        own[-1] = "met by rank -0001"
        wanted = cluster.vectors(num_ranks, num_channels + 1)
        for window, name in zip(windows, own, strict=True):
            window.labels.add(name)
        assert group.sent_bytes() == wanted["another new name on each rank"]
    num_agreed = len(group.summed().names)
    for window in windows:
        window.labels.add("met by all")
    wanted = cluster.vectors(num_ranks, num_agreed)
    assert group.sent_bytes() == wanted["one new name on all ranks"]


def test_the_network_that_is_assumed() -> None:
    """Whole numbers: 4 ranks, 100 bytes, 1 s per step, 50 bytes per second."""
    network = cluster.Network(step_seconds=1.0, bytes_per_second=50.0)
    assert network.ring(100, 4) == 6 * (1 + 0.5)
    assert network.tree(100, 4) == 4 + 4
    assert network.tree(100, 5) == 6 + 4
