"""The protocol by which ranks add up their sums, without a network: what one rank sends, in order.

`exchange` yields a vector, and is given back the sum of that vector over all ranks. Before the
first sums, one vector of fixed length tells whether all ranks have the same columns, and the same
names; if the names differ, the ranks find their union (`name_union`). From then on one vector is
all there is in the steady state; its length depends only on what the ranks agreed on before:

    [ sums of unlabeled and of the agreed names | riders | ranks with new names | stopped
      | mismatch | digest of the agreed names | digest of the new names ]

A rank that met a name which is not agreed on yet says so in that same vector. Where the digests
tell that all ranks have the same new names, one more vector has the sums of these names; else the
ranks first find their union. New names stand sorted behind the old ones. No rank needs to have
seen a channel, or any batch at all, to take part. A rank that has stopped measuring takes part
with zeros, so that nobody waits for it, and makes all ranks raise `StoppedError`.

Letters: C labels of this rank's table, A agreed names, K columns.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.table import SumTable
from channel_metrics.errors import ChannelMetricsError, StoppedError
from channel_metrics.ranks.agreed_names import DIGEST_SIZE, Agreement, all_equal, digest_of
from channel_metrics.ranks.name_union import union_of_names

__all__ = [
    "FIRST_SIZE",
    "HEADER_SIZE",
    "MISMATCH_TOLERANCE",
    "GlobalSums",
    "exchange",
    "local_sums",
]

# A relative difference to the trainer's own loss from which on it is reported.
MISMATCH_TOLERANCE = 1e-4

# Numbers in the first vector, and beside the sums and riders in every later one.
FIRST_SIZE = 1 + 2 * DIGEST_SIZE
HEADER_SIZE = 3 + 2 * DIGEST_SIZE

Vectors = Generator[Tensor, Tensor, "GlobalSums"]


class GlobalSums(NamedTuple):
    """The sums of all ranks. Row 0 of `sums`, float64 [len(names) + 1, K], is `unlabeled`."""

    names: tuple[str, ...]
    sums: Tensor
    mismatch: float
    riders: tuple[float, ...] = ()


class _Local(NamedTuple):
    """What this rank has counted. `rows`: where its `sums` belong in the agreed order."""

    sums: Tensor
    rows: Tensor
    new: list[str]
    mismatch: float


def exchange(
    window: SumTable,
    agreement: Agreement,
    guard: FaultGuard,
    *,
    rank: int,
    num_ranks: int,
    riders: Sequence[float] = (),
) -> Vectors:
    """Yields vectors, takes back their sums over the `num_ranks` ranks, returns all sums.

    Raises, on all ranks alike, `StoppedError` where one has stopped, and `ChannelMetricsError`
    where they do not have the same columns, or do not share what they take for agreed.
    """
    local = _local(window, agreement, guard)
    if not agreement.columns:
        yield from _meet(local, window.columns, agreement, guard, rank=rank, num_ranks=num_ranks)
        local = _local(window, agreement, guard)
    names, width = agreement.names, len(window.columns)
    counts = [bool(local.new), not guard.measuring, local.mismatch]
    header = torch.tensor([*riders, *counts], dtype=torch.float64, device="cpu")
    sums = _placed(local, 0, len(names) + 1).flatten()
    flat = yield torch.cat([sums, header, names.digest, digest_of(local.new)])
    sums = flat[: -HEADER_SIZE - len(riders)].view(-1, width)
    summed_riders = flat[len(sums) * width : -HEADER_SIZE].tolist()
    any_new, num_stopped, mismatch = flat[-HEADER_SIZE:][:3].tolist()
    _refuse_stopped(int(num_stopped))
    of_agreed, of_new = flat[-2 * DIGEST_SIZE :].view(2, DIGEST_SIZE)
    _refuse_unequal(len(names), all_equal(of_agreed, num_ranks=num_ranks))
    if any_new:
        yield from _join(local.new, of_new, agreement, rank, num_ranks)
        local = local._replace(rows=agreement.names.rows_of(window.labels))
        joined = len(agreement.names) - len(names)
        added = yield _placed(local, len(names) + 1, joined).flatten()
        sums = torch.cat([sums, added.view(-1, width)])
    return GlobalSums(agreement.names.names, sums, mismatch, tuple(summed_riders))


def local_sums(window: SumTable, guard: FaultGuard, riders: Sequence[float] = ()) -> GlobalSums:
    """The sums of a rank that is alone; raises `StoppedError` if it has stopped."""
    with guard.guarded():
        if guard.measuring:
            told = _told(window.mismatch())
            return GlobalSums(window.labels.names, window.sums(), told, tuple(riders))
    raise _stopped_error(1)


def _meet(
    local: _Local,
    columns: Sequence[str],
    agreement: Agreement,
    guard: FaultGuard,
    *,
    rank: int,
    num_ranks: int,
) -> Generator[Tensor, Tensor, None]:
    """Before the first sums: the same columns on all ranks, and the names that they begin with."""
    stopped = torch.tensor([not guard.measuring], dtype=torch.float64, device="cpu")
    flat = yield torch.cat([stopped, digest_of(columns), digest_of(local.new)])
    _refuse_stopped(int(flat[0]))
    of_columns, of_names = flat[1:].view(2, DIGEST_SIZE)
    if not all_equal(of_columns, num_ranks=num_ranks):
        raise ChannelMetricsError(
            f"expected the same columns on all ranks, but they differ (here: {', '.join(columns)})"
            "; register the same columns, and give every rank the same metrics config."
        )
    yield from _join(local.new, of_names, agreement, rank, num_ranks)
    agreement.columns = tuple(columns)


def _join(
    new: Sequence[str], digests: Tensor, agreement: Agreement, rank: int, num_ranks: int
) -> Generator[Tensor, Tensor, None]:
    """The new names of all ranks join those that are agreed on."""
    joined = tuple(new)
    if not all_equal(digests, num_ranks=num_ranks):
        joined = yield from union_of_names(new, rank, num_ranks)
    agreement.names = agreement.names.extended(joined)


def _local(window: SumTable, agreement: Agreement, guard: FaultGuard) -> _Local:
    """What this rank has counted; zeros if it has stopped, or stops here."""
    with guard.guarded():
        if guard.measuring:
            rows = agreement.names.rows_of(window.labels)
            new = (rows < 0).nonzero().flatten().tolist()
            names = window.labels.names if new else ()
            sorted_new = sorted(names[row - 1] for row in new)
            return _Local(window.sums(), rows, sorted_new, _told(window.mismatch()))
    nothing = torch.zeros(1, len(window.columns), dtype=torch.float64, device="cpu")
    return _Local(nothing, torch.zeros(1, dtype=torch.int64, device="cpu"), [], 0.0)


def _told(mismatch: float) -> float:
    """Below the tolerance it is rounding."""
    return mismatch if mismatch > MISMATCH_TOLERANCE else 0.0


def _placed(local: _Local, start: int, length: int) -> Tensor:
    """[length, K]: the sums of the rows `start` to `start + length` of the agreed order."""
    rows = local.rows - start
    inside = rows >= 0
    placed = local.sums.new_zeros(length, local.sums.shape[1])
    return placed.index_copy_(0, rows[inside], local.sums[inside])


def _refuse_stopped(num_stopped: int) -> None:
    if num_stopped:
        raise _stopped_error(num_stopped)


def _stopped_error(num_stopped: int) -> StoppedError:
    return StoppedError(
        f"{num_stopped} of the ranks that are counted together had an error in the metrics; "
        "see the warning of that rank."
    )


def _refuse_unequal(num_names: int, equal: bool) -> None:
    if not equal:
        raise ChannelMetricsError(
            f"expected all ranks to begin with the same {num_names} names in the same order, but "
            "they do not, so their sums cannot be told apart; give every rank the same channels."
        )
