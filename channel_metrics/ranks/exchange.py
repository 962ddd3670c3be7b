"""What ranks send to add up their sums, as a generator that knows nothing of a network.

`exchange` yields vectors, and is sent the sum of each vector over all ranks. Before the first
sums, one vector of fixed length shows whether all ranks have the same columns and the same names.
If the names differ, the ranks find their union (`name_union`). After that, one vector per call is
enough, as long as no rank meets a new name. Its length depends only on what the ranks agreed on:

    [ sums of unlabeled and of the agreed names | riders | ranks with new names | stopped
      | mismatch | digest of the agreed names | digest of the new names ]

A rank that met a new name reports it in this vector. If the digests of all ranks are equal, they
have the same new names, and one more vector holds the sums of these. If not, the ranks find the
union first. New names are sorted and follow the old ones.

A rank takes part even if it has seen no channel, or no batch at all. A rank that has stopped
measuring takes part once more with zeros. Then all ranks raise `StoppedError`.

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

# A larger relative difference to the trainer's own loss is reported.
MISMATCH_TOLERANCE = 1e-4

# The length of the first vector.
FIRST_SIZE = 1 + 2 * DIGEST_SIZE
# How many numbers a later vector holds besides the sums and the riders.
HEADER_SIZE = 3 + 2 * DIGEST_SIZE


class GlobalSums(NamedTuple):
    """The sums of all ranks.

    names: A of them. sums: float64 [A + 1, K] on the host; row 0 is `unlabeled`. mismatch: see
    `sync`. riders: the sums of the further numbers. beside: the sums of the second table, if there
    is one, with the same rows.
    """

    names: tuple[str, ...]
    sums: Tensor
    mismatch: float
    riders: tuple[float, ...] = ()
    beside: Tensor | None = None


class _Local(NamedTuple):
    """What this rank has counted.

    sums: [C + 1, K]. rows: [C + 1], their rows in the agreed order. new: names that are not
    agreed on yet, sorted.
    """

    sums: Tensor
    rows: Tensor
    new: list[str]
    mismatch: float


def exchange(
    table: SumTable,
    agreement: Agreement,
    guard: FaultGuard,
    *,
    rank: int,
    num_ranks: int,
    riders: Sequence[float] = (),
    beside: SumTable | None = None,
) -> Generator[Tensor, Tensor, GlobalSums]:
    """Add up the sums of all ranks.

    Args:
        table: the sums of this rank.
        agreement: what the ranks agreed on before; new names are added to it.
        guard: says whether this rank still measures.
        rank, num_ranks: which rank this is, and of how many.
        riders: further numbers to add up, as many on each rank.
        beside: another table with the same labels, whose sums travel in the same vectors.

    Yields:
        Vectors. Send back the sum of each over all ranks.

    Returns:
        The sums of all ranks, the same on each of them.

    Raises:
        StoppedError: on all ranks, if one has stopped.
        ChannelMetricsError: on all ranks, if their columns or their agreed names differ.
    """
    tables = [table] if beside is None else [table, beside]
    local = _local(tables, agreement, guard)
    if not agreement.columns:
        columns = [name for one in tables for name in one.columns]
        yield from _meet(local, columns, agreement, guard, rank=rank, num_ranks=num_ranks)
        local = _local(tables, agreement, guard)
    names, width = agreement.names, local.sums.shape[1]
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
        local = local._replace(rows=agreement.names.rows_of(table.labels))
        joined = len(agreement.names) - len(names)
        added = yield _placed(local, len(names) + 1, joined).flatten()
        sums = torch.cat([sums, added.view(-1, width)])
    own, others = sums.tensor_split([len(table.columns)], dim=1)
    of_beside = None if beside is None else others
    return GlobalSums(agreement.names.names, own, mismatch, tuple(summed_riders), of_beside)


def local_sums(
    table: SumTable,
    guard: FaultGuard,
    riders: Sequence[float] = (),
    beside: SumTable | None = None,
) -> GlobalSums:
    """The sums of a rank that counts alone; raises `StoppedError` if it has stopped."""
    with guard.guarded():
        if guard.measuring:
            mismatch = _reported(table.mismatch())
            of_beside = None if beside is None else beside.sums()
            names, sums = table.labels.names, table.sums()
            return GlobalSums(names, sums, mismatch, tuple(riders), of_beside)
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
    """Before the first sums: check that all ranks have the same columns, and agree on names."""
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
    """Add the new names of all ranks to those that are agreed on."""
    joined = tuple(new)
    if not all_equal(digests, num_ranks=num_ranks):
        joined = yield from union_of_names(new, rank, num_ranks)
    agreement.names = agreement.names.extended(joined)


def _local(tables: Sequence[SumTable], agreement: Agreement, guard: FaultGuard) -> _Local:
    """What this rank has counted; zeros if it has stopped, or if an error stops it here."""
    table = tables[0]
    with guard.guarded():
        if guard.measuring:
            rows = agreement.names.rows_of(table.labels)
            new = (rows < 0).nonzero().flatten().tolist()
            names = table.labels.names if new else ()
            sorted_new = sorted(names[row - 1] for row in new)
            sums = torch.cat([one.sums() for one in tables], dim=1)
            return _Local(sums, rows, sorted_new, _reported(table.mismatch()))
    width = sum(len(one.columns) for one in tables)
    nothing = torch.zeros(1, width, dtype=torch.float64, device="cpu")
    return _Local(nothing, torch.zeros(1, dtype=torch.int64, device="cpu"), [], 0.0)


def _reported(mismatch: float) -> float:
    """0 for a mismatch that is only rounding."""
    return mismatch if mismatch > MISMATCH_TOLERANCE else 0.0


def _placed(local: _Local, start: int, length: int) -> Tensor:
    """[length, K]: the sums for the rows from `start` on, in the agreed order."""
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
            "they do not, so their sums cannot be matched; give every rank the same channels."
        )
