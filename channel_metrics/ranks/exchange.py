"""The protocol by which ranks add up their sums, without a network: what one rank sends, in order.

`exchange` yields a vector, and is given back the sum of that vector over all ranks. The first one
is all there is in the steady state; its length depends only on what the ranks agreed on before:

    [ sums of unlabeled and of the agreed names | ranks with new names | stopped | mismatch
      | digest of the agreed names | digest of the new names ]

A rank that met a name which is not agreed on yet says so in that same vector. Where the digests
tell that all ranks have the same new names (a first log with declared names), one more vector has
the sums of these names. Else the ranks first find the union of their names (`name_union`). New
names stand sorted behind the old ones. No rank needs to have seen a channel, or any batch at all,
to take part. A rank that has stopped measuring takes part with zeros, so that nobody waits for it,
and makes all ranks raise `StoppedError`.

Letters: C channels of this rank's table, A agreed names, K columns.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.labels import ChannelTable
from channel_metrics.errors import ChannelMetricsError, StoppedError
from channel_metrics.ranks.agreed_names import DIGEST_SIZE, AgreedNames, all_equal, digest_of
from channel_metrics.ranks.name_union import union_of_names

__all__ = ["MISMATCH_TOLERANCE", "GlobalSums", "Summable", "exchange", "local_sums"]

# A relative difference to the trainer's own loss from which on it is reported.
MISMATCH_TOLERANCE = 1e-4

_HEADER = 3 + 2 * DIGEST_SIZE


class Summable(Protocol):
    """Sums per channel that can be added up over ranks: rows by name, `unlabeled` first."""

    table: ChannelTable
    # Names that all ranks of a group are known to share.
    agreed_names: AgreedNames

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


class GlobalSums(NamedTuple):
    """The sums of all ranks. Row 0 of `sums`, float64 [len(names) + 1, K], is `unlabeled`."""

    names: tuple[str, ...]
    sums: Tensor
    mismatch: float


class _Local(NamedTuple):
    """What this rank has counted. `rows`: where its `sums` belong in the agreed order."""

    sums: Tensor
    rows: Tensor
    new: list[str]
    mismatch: float


def exchange(
    window: Summable, rank: int, num_ranks: int, guard: FaultGuard
) -> Generator[Tensor, Tensor, GlobalSums]:
    """Yields vectors, takes back their sums over the `num_ranks` ranks, returns all sums.

    Raises, on all ranks alike, `StoppedError` where one has stopped, and `ChannelMetricsError`
    where they do not share what they take for agreed.
    """
    agreed, width = window.agreed_names, window.num_columns
    local = _local(window, guard)
    stopped = not guard.measuring
    header = torch.tensor([bool(local.new), stopped, local.mismatch], dtype=torch.float64)
    sums = _placed(local, 0, len(agreed) + 1).flatten()
    flat = yield torch.cat([sums, header, agreed.digest, digest_of(local.new)])
    sums, header = flat[:-_HEADER].view(-1, width), flat[-_HEADER:]
    any_new, num_stopped, mismatch = header[:3].tolist()
    _refuse_stopped(int(num_stopped))
    of_agreed, of_new = header[3:].view(2, DIGEST_SIZE)
    _refuse_unequal(agreed, all_equal(of_agreed, num_ranks=num_ranks))
    if any_new:
        joined = tuple(local.new)
        if not all_equal(of_new, num_ranks=num_ranks):
            joined = yield from union_of_names(local.new, rank, num_ranks)
        window.agreed_names = agreed.extended(joined)
        local = local._replace(rows=window.agreed_names.rows_of(window.table))
        added = yield _placed(local, len(agreed) + 1, len(joined)).flatten()
        sums = torch.cat([sums, added.view(-1, width)])
    return GlobalSums(window.agreed_names.names, sums, mismatch)


def local_sums(window: Summable, guard: FaultGuard) -> GlobalSums:
    """The sums of a rank that is alone; raises `StoppedError` if it has stopped."""
    with guard.guarded():
        if guard.measuring:
            return GlobalSums(window.table.names, window.sums(), _told(window.mismatch()))
    raise _stopped_error(1)


def _local(window: Summable, guard: FaultGuard) -> _Local:
    """What this rank has counted; zeros if it has stopped, or stops here."""
    with guard.guarded():
        if guard.measuring:
            rows = window.agreed_names.rows_of(window.table)
            new = (rows < 0).nonzero().flatten().tolist()
            names = window.table.names if new else ()
            sorted_new = sorted(names[row - 1] for row in new)
            return _Local(window.sums(), rows, sorted_new, _told(window.mismatch()))
    nothing = torch.zeros(1, window.num_columns, dtype=torch.float64)
    return _Local(nothing, torch.zeros(1, dtype=torch.int64), [], 0.0)


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


def _refuse_unequal(agreed: AgreedNames, equal: bool) -> None:
    if not equal:
        raise ChannelMetricsError(
            f"expected all ranks to begin with the same {len(agreed)} names in the same order, but "
            "they do not, so their sums cannot be told apart; give every rank the same channels."
        )
