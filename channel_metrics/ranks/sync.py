"""An accumulator and a process group -> the sums of all ranks, with one all-reduce.

All ranks of the group call `sync` at the same log points. What they send, and what a new name
costs, stands in `channel_metrics.ranks.exchange`; here it meets torch.distributed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.faults import FaultGuard
from channel_metrics.ranks.exchange import (
    MISMATCH_TOLERANCE,
    GlobalSums,
    Summable,
    exchange,
    local_sums,
)

__all__ = ["MISMATCH_TOLERANCE", "GlobalSums", "Summable", "sum_over_ranks", "sync"]


def sync(
    accumulator: ChannelLossAccumulator,
    group: dist.ProcessGroup | None = None,
    *,
    alone: bool = False,
    guard: FaultGuard | None = None,
) -> ChannelLossAccumulator:
    """A new accumulator on the host with the sums over all ranks of `group`.

    group: the ranks that each counted tokens nobody else counted; None is the default group.
        Without torch.distributed initialised, there is one rank.
    alone: this rank trains by itself, whatever process group there is; nothing is sent.
    guard: says whether this rank still measures. Raises `StoppedError` on all ranks if one does
        not.

    The given accumulator keeps its sums (reset it to open the next window). `mismatch` of the
    result is 0 if no rank exceeds MISMATCH_TOLERANCE, else the sum over the ranks that do: an
    upper bound of the largest, since one all-reduce can only add.
    """
    found = sum_over_ranks(accumulator, group, alone=alone, guard=guard)
    if _is_alone(alone):
        table = accumulator.table.open_copy()
    else:
        table = accumulator.agreed_names.new_table(accumulator.table)
    return ChannelLossAccumulator.of_sums(
        table, found.sums, metrics=accumulator.metrics, mismatch=found.mismatch
    )


def sum_over_ranks(
    window: Summable,
    group: dist.ProcessGroup | None = None,
    *,
    alone: bool = False,
    guard: FaultGuard | None = None,
) -> GlobalSums:
    """The names and sums of all ranks, those of `unlabeled` first, and the mismatch.

    The other arguments are those of `sync`.
    """
    guard = guard or FaultGuard()
    if _is_alone(alone):
        return local_sums(window, guard)
    steps = exchange(window, dist.get_rank(group), dist.get_world_size(group), guard)
    vector = next(steps)
    while True:
        summed = _all_reduce(vector, window.device, group)
        try:
            vector = steps.send(summed)
        except StopIteration as done:
            found: GlobalSums = done.value
            return found


def _is_alone(alone: bool) -> bool:
    return alone or not dist.is_available() or not dist.is_initialized()


def _all_reduce(values: Tensor, device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    # The sums are wanted on the host in any case; only NCCL-like backends need them elsewhere.
    on_host = "gloo" in dist.get_backend(group)
    moved = values if on_host else values.to(device)
    dist.all_reduce(moved, op=dist.ReduceOp.SUM, group=group)
    return moved.to("cpu")
