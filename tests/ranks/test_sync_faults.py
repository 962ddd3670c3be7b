"""`sync` where ranks do not agree, where one has stopped, and where the collective fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist
from rank_cases import TORCH, Case, RanksOf, case
from sync_tools import CountedCollectives, fill

from channel_metrics import ChannelError, ChannelLossAccumulator, ChannelMetricsError, sync
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.schema import TOKENS, Column
from channel_metrics.errors import CollectiveError, StoppedError
from channel_metrics.ranks.agreed_names import AgreedNames, Agreement
from channel_metrics.ranks.sync import sum_over_ranks

STEADY = {"all_reduce": 1}


@case(TORCH, ranks=2)
def two(folder: Path) -> dict[str, Any]:
    return seen_by_this_rank()


@case(TORCH, ranks=4)
def four(folder: Path) -> dict[str, Any]:
    return seen_by_this_rank()


def seen_by_this_rank() -> dict[str, Any]:
    rank, collectives = dist.get_rank(), CountedCollectives()
    return {
        "unequal": unequal_order(rank, collectives),
        "colliding": colliding_names(rank),
        "columns": other_columns(rank, collectives),
        "failing": failing_collective(),
        "stopped": [stopped_rank(rank, place, collectives) for place in ("before", "inside")],
    }


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


def colliding_names(rank: int) -> str:
    accumulator = ChannelLossAccumulator()
    fill(accumulator, [([["x y", "x_y"][rank % 2]], [1.0])])
    with pytest.raises(ChannelError) as refused:
        sync(accumulator)
    return str(refused.value)


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
        cast(Any, accumulator).sums = None
    collectives.take()
    with guard.guarded():
        sync(accumulator, guard=guard)
    return guard.off, collectives.take()


@pytest.mark.parametrize("of", [two, four])
def test_ranks_that_do_not_agree(ranks_of: RanksOf, of: Case) -> None:
    """All of them say so, after one all-reduce."""
    for seen in ranks_of(of):
        assert "in the same order" in seen["unequal"][0] and seen["unequal"][1] == STEADY
        assert "expected the same columns on all ranks" in seen["columns"][0]
        assert seen["columns"][1] == STEADY


@pytest.mark.parametrize("of", [two, four])
def test_names_of_two_ranks_that_collide(ranks_of: RanksOf, of: Case) -> None:
    (message,) = {seen["colliding"] for seen in ranks_of(of)}
    assert "would both be logged as 'x_y'" in message


@pytest.mark.parametrize("of", [two, four])
def test_a_collective_that_fails_is_raised(ranks_of: RanksOf, of: Case) -> None:
    assert all(seen["failing"] for seen in ranks_of(of))


@pytest.mark.parametrize("of", [two, four])
def test_a_rank_that_stopped_keeps_nobody_waiting(ranks_of: RanksOf, of: Case) -> None:
    """All are off after one all-reduce."""
    for seen in ranks_of(of):
        assert seen["stopped"] == [(True, STEADY)] * 2


def test_a_stopped_process_alone_stops_without_a_group() -> None:
    guard = FaultGuard("warn")
    for _ in range(2):
        with guard.guarded():
            raise ZeroDivisionError
    with pytest.raises(StoppedError, match="had an error in the metrics"):
        sync(ChannelLossAccumulator(), guard=guard)
