"""The union of the names of all ranks, by all-reduces of whole numbers.

In every round, each rank tells the size and a digest of the names that it has and nobody has sent
yet. If several ranks have the same names left, one of them sends. Then all ranks drop the names
that were sent. The two vectors of a round are:

    index    int64 [N, 3]   row r: digest and length of what rank r has left; zeros: nothing
    payload  int64 [words]  the names of the ranks that send, one after the other

A sender fills its own part of a vector and leaves zeros in the rest, so the sum over the ranks
holds all parts. The bytes of one round are limited, and the limit doubles from round to round.
Names that many ranks share are therefore sent a few times at most, not once per rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable

import torch
from torch import Tensor

from channel_metrics.ranks.agreed_names import as_bytes

__all__ = ["FIRST_BYTES", "union_of_names"]

# How many bytes the senders of the first round may send together. The first sender has no limit.
FIRST_BYTES = 2**20
_WORD = 8


def union_of_names(
    names: Iterable[str], rank: int, num_ranks: int
) -> Generator[Tensor, Tensor, tuple[str, ...]]:
    """Find the names that any rank has.

    All ranks must take part. Every rank yields vectors of the same shapes.

    Args:
        names: the names of this rank; there may be none.
        rank, num_ranks: which rank this is, and of how many.

    Yields:
        int64 vectors. Send back the sum of each over all ranks.

    Returns:
        The sorted union, the same on all ranks.
    """
    left, union, limit = set(names), set[str](), FIRST_BYTES
    while True:
        own = _padded(as_bytes(sorted(left)))
        index = yield _index(own, rank, num_ranks)
        places, done = _places(index, limit)
        if places:
            sent = yield from _send(own if rank in places else b"", places, rank)
            union |= sent
            left -= sent
        if done:
            # Names can be left only after a hash collision, of 128 bits of SHA-256.
            assert not left
            return tuple(sorted(union))
        limit *= 2


def _padded(payload: bytes) -> bytes:
    """`payload` in whole words, filled up with spaces, which JSON ignores."""
    return payload.ljust(-(-len(payload) // _WORD) * _WORD)


def _index(own: bytes, rank: int, num_ranks: int) -> Tensor:
    """int64 [num_ranks, 3]; only row `rank` is filled."""
    index = torch.zeros(num_ranks, 3, dtype=torch.int64, device="cpu")
    if own:
        taken = hashlib.sha256(own).digest()
        halves = [int.from_bytes(taken[i : i + _WORD], "big", signed=True) for i in (0, _WORD)]
        index[rank] = torch.tensor([*halves, len(own)], device="cpu")
    return index


def _places(index: Tensor, limit: int) -> tuple[dict[int, range], bool]:
    """{rank that sends: its bytes in the payload}, and whether this is the last round."""
    senders: dict[tuple[int, ...], int] = {}
    for rank, row in enumerate(index.tolist()):
        if row[-1]:
            senders.setdefault(tuple(row), rank)
    # The longest list goes first: other ranks then need not send the names that it holds.
    queue = sorted((-row[-1], rank) for row, rank in senders.items())
    places: dict[int, range] = {}
    end = 0
    for length, rank in queue:
        if places and end - length > limit:
            break
        places[rank] = range(end, end - length)
        end -= length
    return places, len(places) == len(queue)


def _send(own: bytes, places: dict[int, range], rank: int) -> Generator[Tensor, Tensor, set[str]]:
    payload = bytearray(max(place.stop for place in places.values()))
    if own:
        payload[places[rank].start : places[rank].stop] = own
    # `words` shares the memory of `payload`.
    words = torch.frombuffer(payload, dtype=torch.int64)
    words.copy_((yield words))
    parts = (payload[place.start : place.stop] for place in places.values())
    return set().union(*map(json.loads, parts))
