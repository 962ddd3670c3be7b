"""A table of sums and the ranks -> the sums of all ranks, with one all-reduce.

All ranks call this at the same log points. What they send, and what a new name costs, stands in
`channel_metrics.ranks.exchange`; here it meets torch.distributed.
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
from channel_metrics.ranks.exchange import (
    MISMATCH_TOLERANCE,
    GlobalSums,
    exchange,
    local_sums,
)
from channel_metrics.ranks.ranks import Ranks

__all__ = ["MISMATCH_TOLERANCE", "GlobalSums", "sum_over_ranks", "sync"]

# What the ranks agreed on for an accumulator that belongs to no session.
_agreements: WeakKeyDictionary[SumTable, Agreement] = WeakKeyDictionary()


def sync(
    accumulator: ChannelLossAccumulator,
    group: dist.ProcessGroup | None = None,
    *,
    alone: bool = False,
    guard: FaultGuard | None = None,
) -> ChannelLossAccumulator:
    """A new accumulator on the host with the sums over all ranks of `group`. A collective.

    Args:
        accumulator: keeps its sums; reset it to open the next window.
        group, alone: see `Ranks`.
        guard: says whether this rank still measures.

    Returns:
        The sums under the names of all ranks. Its `mismatch` is 0 if no rank exceeds
        MISMATCH_TOLERANCE, else the sum over the ranks that do: an upper bound of the largest,
        since one all-reduce can only add.

    Raises:
        StoppedError: on all ranks, if one of them has stopped measuring.
    """
    ranks = Ranks(group, alone=alone)
    agreement = _agreements.setdefault(accumulator, Agreement())
    found = sum_over_ranks(accumulator, agreement, ranks, guard)
    like = accumulator.table
    like = like if isinstance(like, ChannelTable) else ChannelTable(like.names)
    table = like.open_copy() if ranks.is_one else agreement.names.new_table(like)
    return ChannelLossAccumulator.of_sums(
        table, found.sums, metrics=accumulator.metrics, mismatch=found.mismatch
    )


def sum_over_ranks(
    window: SumTable,
    agreement: Agreement,
    ranks: Ranks | None = None,
    guard: FaultGuard | None = None,
    riders: Sequence[float] = (),
) -> GlobalSums:
    """The names and sums of all ranks, those of `unlabeled` first. A collective.

    Args:
        window: keeps its sums.
        agreement: what these ranks agreed on before; it is carried on from window to window.
        guard: says whether this rank still measures.
        riders: a few numbers more that are added up over the ranks, as many on each of them.

    Raises:
        StoppedError: on all ranks, if one of them has stopped measuring.
        ChannelMetricsError: on all ranks, if they do not have the same columns.
    """
    ranks, guard = ranks or Ranks(), guard or FaultGuard()
    if ranks.is_one:
        return local_sums(window, guard, riders)
    steps = exchange(window, agreement, guard, rank=ranks.rank, num_ranks=ranks.size, riders=riders)
    vector = next(steps)
    while True:
        summed = ranks.all_reduce(vector)
        try:
            vector = steps.send(summed)
        except StopIteration as done:
            found: GlobalSums = done.value
            return found
