"""Add up the sums of all ranks with one all-reduce of torch.distributed.

All ranks call this at the same log points. `channel_metrics.ranks.exchange` describes what they
send, and what a new name costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch.distributed as dist

from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import ChannelTable
from channel_metrics.core.table import SumTable
from channel_metrics.ranks.agreed_names import Agreement
from channel_metrics.ranks.exchange import GlobalSums, exchange, local_sums
from channel_metrics.ranks.ranks import Ranks

__all__ = ["sum_over_ranks", "sync"]

# What the ranks agreed on, for each accumulator that belongs to no session.
_agreements: WeakKeyDictionary[SumTable, Agreement] = WeakKeyDictionary()


def sync(
    accumulator: ChannelLossAccumulator,
    group: dist.ProcessGroup | None = None,
    *,
    alone: bool = False,
    guard: FaultGuard | None = None,
) -> ChannelLossAccumulator:
    """A new accumulator with the sums over all ranks of `group`, on the host. A collective.

    Args:
        accumulator: the sums of this rank. It keeps them; reset it to open the next window.
        group, alone: see `Ranks`.
        guard: says whether this rank still measures.

    Returns:
        The sums under the names of all ranks. Its `mismatch` is 0 if no rank exceeds
        `MISMATCH_TOLERANCE`. Otherwise it is the sum over the ranks that do, because an
        all-reduce can only add. That is an upper bound of the largest.

    Raises:
        StoppedError: on all ranks, if one of them has stopped measuring.
        ChannelError: on all ranks, if names of different ranks would share a log key.
    """
    ranks = Ranks(group, alone=alone)
    agreement = _agreements.setdefault(accumulator, Agreement())
    found = sum_over_ranks(accumulator, agreement, ranks, guard)
    like = accumulator.table
    like = like if isinstance(like, ChannelTable) else ChannelTable(like.names)
    joined = like.open_copy(found.names)
    return ChannelLossAccumulator.of_sums(
        joined,
        found.sums,
        metrics=accumulator.metrics,
        mismatch=found.mismatch,
        schema=accumulator.schema,
    )


def sum_over_ranks(
    table: SumTable,
    agreement: Agreement,
    ranks: Ranks | None = None,
    guard: FaultGuard | None = None,
    riders: Sequence[float] = (),
    *,
    beside: SumTable | None = None,
) -> GlobalSums:
    """The names and sums of all ranks. A collective.

    Args:
        table: the sums of this rank. It keeps them.
        agreement: what these ranks agreed on before. Give the same object in every call.
        guard: says whether this rank still measures.
        riders: a few more numbers to add up over the ranks. Each rank gives as many.
        beside: another table with the same labels, whose sums travel in the same all-reduce. All
            ranks give one with as many columns, or none.

    Raises:
        StoppedError: on all ranks, if one of them has stopped measuring.
        ChannelMetricsError: on all ranks, if they do not have the same columns.
    """
    ranks, guard = ranks or Ranks(), guard or FaultGuard()
    if ranks.is_one:
        return local_sums(table, guard, riders, beside)
    steps = exchange(
        table,
        agreement,
        guard,
        rank=ranks.rank,
        num_ranks=ranks.size,
        riders=riders,
        beside=beside,
    )
    vector = next(steps)
    while True:
        summed = ranks.all_reduce(vector)
        try:
            vector = steps.send(summed)
        except StopIteration as done:
            found: GlobalSums = done.value
            return found
