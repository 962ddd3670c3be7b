"""Names that all ranks share, and a digest by which they find out that they do.

>>> first, second = (AgreedNames(["bbu", "rru"]).digest for _ in range(2))
>>> all_equal(first + second, num_ranks=2)
True
>>> all_equal(first + AgreedNames(["rru", "bbu"]).digest, num_ranks=2)
False

Ranks can only add. A digest therefore travels as 16 numbers: eight words of 16 bits, and their
squares. For N ranks, N x (sum of squares) = (sum)^2 exactly where all words are equal, and more
everywhere else (Cauchy-Schwarz). Up to 2^21 ranks, both sums are whole numbers below 2^53, which
float64 holds without rounding, in whatever order a backend adds them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from channel_metrics.core.keys import ChannelTable
from channel_metrics.core.labels import LabelTable

__all__ = ["DIGEST_SIZE", "AgreedNames", "Agreement", "all_equal", "digest_of", "packed"]

_NUM_WORDS = 8
DIGEST_SIZE = 2 * _NUM_WORDS


class AgreedNames:
    """Names that all ranks of a group share, in the order that all of them use. Immutable.

    What is derived from the names is made when it is first needed, and kept: in the steady state
    nothing here depends on the number of names but a copy of a table.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = tuple(names)
        self._rows: tuple[LabelTable, Tensor] | None = None
        self._table: ChannelTable | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"AgreedNames({list(self.names)})"

    @cached_property
    def digest(self) -> Tensor:
        """float64 [DIGEST_SIZE] of the names in their order."""
        return digest_of(self.names)

    def extended(self, names: Iterable[str]) -> AgreedNames:
        """These names, and `names` behind them."""
        longer = AgreedNames((*self.names, *names))
        longer._table = self._table
        return longer

    def rows_of(self, table: LabelTable) -> Tensor:
        """int64 [C + 1]: where sums of `table` belong; -1 for names that are not agreed on.

        Row 0 (unlabeled) stays row 0, and row i + 1 is that of the table's name i.
        """
        # A table only grows, so that one of the same length has the same names.
        if self._rows is None or self._rows[0] is not table or len(self._rows[1]) <= len(table):
            place = {name: row for row, name in enumerate(self.names, start=1)}
            rows = [0, *(place.get(name, -1) for name in table.names)]
            self._rows = table, torch.tensor(rows, dtype=torch.int64, device="cpu")
        return self._rows[1]

    def new_table(self, like: ChannelTable) -> ChannelTable:
        """A table of these names in their order, with the key format of `like`, open to any name.

        Raises `ChannelError` for names that would be logged under one key.
        """
        table = self._table
        if table is None or table.key_format != like.key_format:
            table = like if like.names == self.names else ChannelTable(key_format=like.key_format)
        if table is like or len(table) < len(self.names):
            # Names are checked when they join, which takes far longer than a copy.
            table = table.open_copy()
            for name in self.names[len(table) :]:
                table.add(name)
        self._table = table
        return table.open_copy()


class Agreement:
    """What the ranks of a group agreed on, carried from one sync to the next.

    names: grow where a rank meets a new one. columns: of the sums, empty before the first sync.
    """

    def __init__(self) -> None:
        self.names = AgreedNames()
        self.columns: tuple[str, ...] = ()


def packed(names: Sequence[str]) -> bytes:
    """`names` as bytes, the same for the same names only; empty for none."""
    # ASCII, with any name escaped: also those that UTF-8 cannot encode.
    return json.dumps(names, separators=(",", ":")).encode() if names else b""


def digest_of(names: Sequence[str]) -> Tensor:
    """float64 [DIGEST_SIZE]: 16-bit words of a SHA-256 of `names` in this order; their squares."""
    taken = hashlib.sha256(packed(names)).digest()[: 2 * _NUM_WORDS]
    words = [int.from_bytes(taken[i : i + 2], "big") for i in range(0, len(taken), 2)]
    sums = [*words, *(word * word for word in words)]
    return torch.tensor(sums, dtype=torch.float64, device="cpu")


def all_equal(summed: Tensor, *, num_ranks: int) -> bool:
    """Whether `summed`, the sum of the digests of all ranks, is a sum of equal digests."""
    sums = [int(value) for value in summed.tolist()]
    pairs = zip(sums[:_NUM_WORDS], sums[_NUM_WORDS:], strict=True)
    # Whole numbers of Python: these products are beyond what float64 holds exactly.
    return all(num_ranks * squares == total * total for total, squares in pairs)
