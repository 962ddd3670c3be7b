"""An accumulator and a process group -> the sums of all ranks, with one all-reduce.

All ranks of the group call `sync` at the same log points. In the steady state that is one
all-reduce of a vector whose length depends only on what the ranks agreed on before:

    [ sums of the agreed names, in the agreed order | ranks with new names | stopped | mismatch ]

A rank that met a name which is not agreed on yet says so in that same vector. Only then do all
ranks gather the new names, agree on the sorted union behind the old order, and reduce the rows
of these names: two more collectives, once per new name. No rank needs to have seen a channel,
or any batch at all, to take part. A rank that has stopped measuring takes part with zeros, so that
nobody waits for it, and makes all ranks raise `StoppedError`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from channel_metrics.accumulator import ChannelLossAccumulator
from channel_metrics.channels import ChannelTable
from channel_metrics.errors import StoppedError
from channel_metrics.faults import FaultGuard

__all__ = ["MISMATCH_TOLERANCE", "Summable", "sum_over_ranks", "sync"]

# A relative difference to the trainer's own loss from which on it is reported.
MISMATCH_TOLERANCE = 1e-4


class Summable(Protocol):
    """Sums per channel that `sum_over_ranks` can add up: rows by name, `unlabeled` first."""

    table: ChannelTable
    # Names that all ranks of a group are known to share.
    agreed_names: tuple[str, ...]

    @property
    def num_columns(self) -> int:
        """K, the same on all ranks."""

    @property
    def device(self) -> torch.device:
        """Where the sums live."""

    def sums(self) -> Tensor:
        """float64 [C + 1, K] on the host: row 0 unlabeled, row i + 1 channel i."""

    def mismatch(self) -> float:
        """The largest relative difference to what the trainer itself computed."""


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
    return _result(accumulator, *sum_over_ranks(accumulator, group, alone=alone, guard=guard))


def sum_over_ranks(
    window: Summable,
    group: dist.ProcessGroup | None = None,
    *,
    alone: bool = False,
    guard: FaultGuard | None = None,
) -> tuple[dict[str, Tensor], Tensor, float]:
    """The sums of all ranks: {channel: [K]}, those of `unlabeled` [K], and the mismatch.

    The other arguments are those of `sync`.
    """
    guard = guard or FaultGuard()
    local, unlabeled, mismatch = _local_sums(window, guard)
    stopped = float(not guard.measuring)
    if not alone and dist.is_available() and dist.is_initialized():
        agreed, width = window.agreed_names, window.num_columns
        new = sorted(set(local) - set(agreed))
        header = torch.tensor([float(bool(new)), stopped, mismatch], dtype=torch.float64)
        flat = torch.cat([unlabeled, _rows(local, agreed, width).flatten(), header])
        flat = _all_reduce(flat, window.device, group)
        unlabeled, rows = flat[:width], flat[width:-3].view(-1, width)
        any_new, stopped, mismatch = flat[-3:].tolist()
        # Known to all ranks: those of new names need not be asked any more.
        if any_new and not stopped:
            joined = _gather_names(new, group)
            added = _all_reduce(_rows(local, joined, width), window.device, group)
            agreed, rows = (*agreed, *joined), torch.cat([rows, added])
            window.agreed_names = agreed
        local = dict(zip(agreed, rows, strict=True))
    if stopped:
        raise StoppedError(
            f"{int(stopped)} of the ranks that are counted together had an error in the metrics; "
            "see the warning of that rank."
        )
    return local, unlabeled, mismatch


def _local_sums(window: Summable, guard: FaultGuard) -> tuple[dict[str, Tensor], Tensor, float]:
    """What this rank has counted; zeros if it has stopped, or stops here."""
    with guard.guarded():
        if guard.measuring:
            mismatch = window.mismatch()
            unlabeled, *known = window.sums().unbind()
            local = dict(zip(window.table.names, known, strict=True))
            return local, unlabeled, mismatch if mismatch > MISMATCH_TOLERANCE else 0.0
    return {}, torch.zeros(window.num_columns, dtype=torch.float64), 0.0


def _rows(local: dict[str, Tensor], names: tuple[str, ...], width: int) -> Tensor:
    absent = torch.zeros(width, dtype=torch.float64)
    return torch.stack([local.get(name, absent) for name in names] or [absent])[: len(names)]


def _all_reduce(values: Tensor, device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    # The sums are wanted on the host in any case; only NCCL-like backends need them elsewhere.
    on_host = "gloo" in dist.get_backend(group)
    moved = values if on_host else values.to(device)
    dist.all_reduce(moved, op=dist.ReduceOp.SUM, group=group)
    return moved.to("cpu")


def _gather_names(new: list[str], group: dist.ProcessGroup | None) -> tuple[str, ...]:
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, new, group=group)
    return tuple(sorted(set().union(*gathered)))


def _result(
    accumulator: ChannelLossAccumulator,
    rows: dict[str, Tensor],
    unlabeled: Tensor,
    mismatch: float,
) -> ChannelLossAccumulator:
    table = ChannelTable(rows, key_format=accumulator.table.key_format)
    result = ChannelLossAccumulator(table, metrics=accumulator.metrics)
    state = result.state_dict()
    state["sums"] = torch.stack([unlabeled, *rows.values()])
    state["mismatch"] = mismatch
    return result.load_state_dict(state)
