"""The union of the names of all ranks, by all-reduces of whole numbers.

Every round, each rank that still has names nobody has sent says how many bytes they take, with a
digest. Of ranks with the same names one sends, and all ranks drop what was sent:

    index    int64 [N, 3]   row r: digest and length of what rank r has left; zeros: nothing
    payload  int64 [words]  the names of the ranks that send, one behind the other

A sender fills its own part of a vector and leaves zeros in the rest, so that the sum over the
ranks is all parts. The bytes of one round are limited, and the limit doubles: names that many
ranks share beside others of their own are sent a few times at most, not once per rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable

import torch
from torch import Tensor

from channel_metrics.ranks.agreed_names import packed

__all__ = ["FIRST_BYTES", "union_of_names"]

# What the senders of the first round may send together; one of them is never too long.
FIRST_BYTES = 2**20
_WORD = 8


def union_of_names(
    names: Iterable[str], rank: int, num_ranks: int
) -> Generator[Tensor, Tensor, tuple[str, ...]]:
    """Yields int64 vectors and takes back their sums over all ranks; returns the sorted union.

    All ranks must take part; `names` may be empty. Every rank yields the same shapes.
    """
    left, union, limit = set(names), set[str](), FIRST_BYTES
    while True:
        own = _padded(packed(sorted(left)))
        index = yield _index(own, rank, num_ranks)
        places, done = _places(index, limit)
        if places:
            sent = yield from _send(own if rank in places else b"", places, rank)
            union |= sent
            left -= sent
        if done:
            # Else two lists of names would have the same 128 bits of SHA-256.
            assert not left
            return tuple(sorted(union))
        limit *= 2


def _padded(payload: bytes) -> bytes:
    """`payload` in whole words; JSON does not mind spaces."""
    return payload.ljust(-(-len(payload) // _WORD) * _WORD)


def _index(own: bytes, rank: int, num_ranks: int) -> Tensor:
    """int64 [num_ranks, 3], zeros but for row `rank`."""
    index = torch.zeros(num_ranks, 3, dtype=torch.int64, device="cpu")
    if own:
        taken = hashlib.sha256(own).digest()
        halves = [int.from_bytes(taken[i : i + _WORD], "big", signed=True) for i in (0, _WORD)]
        index[rank] = torch.tensor([*halves, len(own)], device="cpu")
    return index


def _places(index: Tensor, limit: int) -> tuple[dict[int, range], bool]:
    """{rank that sends: its bytes in the payload}, and whether nothing is left after that."""
    senders: dict[tuple[int, ...], int] = {}
    for rank, row in enumerate(index.tolist()):
        if row[-1]:
            senders.setdefault(tuple(row), rank)
    # The longest first: what they share with others then need not be sent again.
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
    # Shares the memory of `payload`.
    words = torch.frombuffer(payload, dtype=torch.int64)
    words.copy_((yield words))
    parts = (payload[place.start : place.stop] for place in places.values())
    return set().union(*map(json.loads, parts))
