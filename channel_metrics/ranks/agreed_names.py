"""Names that all ranks share, and a digest by which the ranks check that they are the same.

>>> first, second = (AgreedNames(["bbu", "rru"]).digest for _ in range(2))
>>> all_equal(first + second, num_ranks=2)
True
>>> all_equal(first + AgreedNames(["rru", "bbu"]).digest, num_ranks=2)
False

An all-reduce can only add, so a digest is sent as 16 numbers: eight words of 16 bits, and their
squares. For N ranks, N x (sum of squares) = (sum)^2 if all words are equal. If they differ, the
left side is larger (Cauchy-Schwarz). Up to 2^21 ranks, both sums are whole numbers below 2^53.
float64 holds these without rounding, whatever the order in which a backend adds them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from channel_metrics.core.labels import LabelTable

__all__ = ["DIGEST_SIZE", "AgreedNames", "Agreement", "all_equal", "as_bytes", "digest_of"]

_NUM_WORDS = 8
DIGEST_SIZE = 2 * _NUM_WORDS


class AgreedNames:
    """Names that all ranks of a group share, in the order that all of them use. Immutable.

    The digest and the row numbers are computed when they are first needed, and kept.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = tuple(names)
        self._rows: tuple[LabelTable, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> Tensor:
        """float64 [DIGEST_SIZE] of the names in their order."""
        return digest_of(self.names)

    def extended(self, names: Iterable[str]) -> AgreedNames:
        """These names, followed by `names`."""
        return AgreedNames((*self.names, *names))

    def rows_of(self, table: LabelTable) -> Tensor:
        """For each row of sums of a rank, the row in the agreed order.

        Args:
            table: the C labels of the rank. Row 0 of its sums is unlabeled, row i + 1 is name i.

        Returns:
            int64 [C + 1]. Unlabeled is row 0 here, too. A name that is not agreed on has -1.
        """
        # A table only grows. If its length is the same, its names are the same.
        if self._rows is None or self._rows[0] is not table or len(self._rows[1]) <= len(table):
            place = {name: row for row, name in enumerate(self.names, start=1)}
            rows = [0, *(place.get(name, -1) for name in table.names)]
            self._rows = table, torch.tensor(rows, dtype=torch.int64, device="cpu")
        return self._rows[1]


class Agreement:
    """What the ranks of a group agreed on, kept from one sync to the next.

    names: grow when a rank meets a new name. columns: those of the sums; if they are given, all
    ranks are configured alike, and the first sync asks for nothing beforehand.
    """

    def __init__(self, names: Iterable[str] = (), columns: Iterable[str] = ()) -> None:
        self.names = AgreedNames(names)
        self.columns = tuple(columns)


def as_bytes(names: Sequence[str]) -> bytes:
    """`names` as bytes; other names give other bytes, and no names give none."""
    # Escaped to ASCII, because UTF-8 cannot encode every name.
    return json.dumps(names, separators=(",", ":")).encode() if names else b""


def digest_of(names: Sequence[str]) -> Tensor:
    """float64 [DIGEST_SIZE]: 16-bit words of a SHA-256 of `names` in this order, then squares."""
    taken = hashlib.sha256(as_bytes(names)).digest()[: 2 * _NUM_WORDS]
    words = [int.from_bytes(taken[i : i + 2], "big") for i in range(0, len(taken), 2)]
    sums = [*words, *(word * word for word in words)]
    return torch.tensor(sums, dtype=torch.float64, device="cpu")


def all_equal(summed: Tensor, *, num_ranks: int) -> bool:
    """Whether `summed`, the sum of the digests of all ranks, is a sum of equal digests."""
    sums = [int(value) for value in summed.tolist()]
    pairs = zip(sums[:_NUM_WORDS], sums[_NUM_WORDS:], strict=True)
    # As integers: float64 cannot hold these products exactly.
    return all(num_ranks * squares == total * total for total, squares in pairs)
