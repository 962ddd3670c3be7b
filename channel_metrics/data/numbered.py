"""Numbers in the upper bits of token ids, while a framework makes rows of records.

It may drop records, pack them in another order, or cut them: each token keeps the number of the
record that it comes from.

>>> row = numbered([5, 6], 1) + numbered([5], 2)
>>> [number_of(token) for token in row]
[1, 1, 2]
>>> without_numbers(row)
[5, 6, 5]
"""

from __future__ import annotations

from collections.abc import Iterable

from channel_metrics.errors import UnsupportedVersionError

__all__ = ["number_of", "numbered", "unmatched", "without_numbers"]

_BITS = 32


def numbered(ids: Iterable[int], number: int) -> list[int]:
    """Token ids with the number of their record, which is 0 or more."""
    return [int(token) | number << _BITS for token in ids]


def number_of(token: int) -> int:
    """The number of a token; 0 if it has none."""
    return token >> _BITS


def without_numbers(ids: Iterable[int]) -> list[int]:
    """The token ids as they were."""
    return [token & ((1 << _BITS) - 1) for token in ids]


def unmatched(rows: str, known: str) -> UnsupportedVersionError:
    """The error for rows whose tokens have no numbers.

    Args:
        rows: whose they are, such as `the rows of LLaMA-Factory`.
        known: the version of the framework that makes them as it should.
    """
    return UnsupportedVersionError(
        f"{rows} cannot be matched with their records: this version makes them in another way than "
        f"{known}; use {known}, or leave the patch out."
    )
