"""Arithmetic, not measurements: what a sync sends, and how long that takes, on many ranks.

The bytes are those of the protocol (`channel_metrics.ranks.exchange`), and a test compares them
with the protocol itself. The times follow from a network that is assumed, see `Network`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from channel_metrics.core.schema import DEFAULT_METRICS, TOKENS
from channel_metrics.ranks.exchange import FIRST_SIZE, HEADER_SIZE
from channel_metrics.ranks.name_union import union_of_names

__all__ = ["Network", "rows", "union_on_host", "vectors"]

RANKS = (64, 1_024, 16_384)
CHANNELS = (1_000, 100_000)
# A list of one name of up to 20 bytes, as it is sent: in whole words of eight bytes.
NAME_BYTES = 24


@dataclass(frozen=True)
class Network:
    """What is assumed: seconds for one step from rank to rank, and bytes per second of a link."""

    step_seconds: float = 5e-6
    bytes_per_second: float = 25e9

    def ring(self, num_bytes: int, num_ranks: int) -> float:
        """2 (N - 1) steps, of which each moves an N-th of the vector over every link."""
        steps = 2 * (num_ranks - 1)
        return steps * (self.step_seconds + num_bytes / num_ranks / self.bytes_per_second)

    def tree(self, num_bytes: int, num_ranks: int) -> float:
        """log2 N steps up and as many down, through which the whole vector flows in pieces."""
        steps = 2 * math.ceil(math.log2(num_ranks))
        return steps * self.step_seconds + 2 * num_bytes / self.bytes_per_second


def vectors(
    num_ranks: int, num_channels: int, *, name_bytes: int = NAME_BYTES
) -> dict[str, list[int]]:
    """{event: bytes of each vector that is all-reduced}; `num_channels` are agreed on before."""
    row = 8 * len(TOKENS.narrowed(DEFAULT_METRICS).columns)
    log = row * (num_channels + 1) + 8 * HEADER_SIZE
    index = 3 * 8 * num_ranks
    return {
        "log": [log],
        "first log, equal names": [8 * FIRST_SIZE, log],
        "one new name on all ranks": [log, row],
        "one new name on one rank": [log, index, name_bytes, row],
        "another new name on each rank": [log, index, name_bytes * num_ranks, row * num_ranks],
    }


def rows(network: Network | None = None) -> list[dict[str, object]]:
    """Collectives, bytes and assumed milliseconds of each event."""
    network = network or Network()
    return [
        {
            "event": event,
            "num_ranks": num_ranks,
            "num_channels": num_channels,
            "collectives": len(sent),
            "bytes": sum(sent),
            "ring_milliseconds": round(sum(network.ring(b, num_ranks) for b in sent) * 1e3, 3),
            "tree_milliseconds": round(sum(network.tree(b, num_ranks) for b in sent) * 1e3, 3),
        }
        for num_channels in CHANNELS
        for num_ranks in RANKS
        for event, sent in vectors(num_ranks, num_channels).items()
    ]


def union_on_host(num_ranks: int = RANKS[-1]) -> dict[str, object]:
    """Measured: what one rank computes to join the names of all, each of which met another one."""
    start = time.perf_counter()
    steps = union_of_names(["met by rank 00000"], 0, num_ranks)
    index = next(steps)
    seconds = time.perf_counter() - start
    length = int(index[0, -1])
    # What the other ranks would have added: digests of their own, and names of the same length.
    index[:, 0], index[:, 1], index[:, 2] = torch.arange(num_ranks), 1, length
    names = (f'["met by rank {rank:05}"]'.ljust(length) for rank in range(num_ranks))
    payload = torch.frombuffer(bytearray("".join(names).encode()), dtype=torch.int64)
    start = time.perf_counter()
    steps.send(index)
    union: tuple[str, ...] = ()
    try:
        steps.send(payload)
    except StopIteration as done:
        union = done.value
    seconds += time.perf_counter() - start
    assert len(union) == num_ranks, "the names of some ranks are missing"
    return {"num_ranks": num_ranks, "milliseconds": round(seconds * 1e3, 2)}
