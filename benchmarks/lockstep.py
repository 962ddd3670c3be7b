"""Many ranks in one process, without a network: their vectors are added up one after the other.

It runs the protocol itself (`channel_metrics.ranks.exchange`), so the vectors counted here are
those that would be sent; what a network and other processes take does not come into it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

__all__ = ["Outcome", "in_lockstep"]

T = TypeVar("T")


class Outcome(NamedTuple, Generic[T]):
    """What each rank returned or raised, and the bytes of each vector that was all-reduced."""

    results: list[T | Exception]
    sent_bytes: list[int]


def in_lockstep(ranks: Iterable[Generator[Tensor, Tensor, T]]) -> Outcome[T]:
    """Run generators that yield a vector, and take back its sum over all of them, to their end.

    Raises `AssertionError` where they yield different shapes or types, or do not end together.
    """
    running = list(ranks)
    sent_bytes: list[int] = []
    summed: Tensor | None = None
    while True:
        # One vector at a time: those of thousands of ranks would not fit into memory.
        total: Tensor | None = None
        ended: list[T | Exception] = []
        for rank in running:
            try:
                vector = next(rank) if summed is None else rank.send(summed)
            except StopIteration as done:
                ended.append(done.value)
                continue
            except Exception as error:  # whatever ends a rank is part of the outcome
                ended.append(error)
                continue
            total = vector.clone() if total is None else _added(total, vector)
        assert len(ended) in (0, len(running)), f"only {len(ended)} of {len(running)} ranks ended"
        if total is None:
            return Outcome(ended, sent_bytes)
        sent_bytes.append(total.numel() * total.element_size())
        summed = total


def _added(total: Tensor, vector: Tensor) -> Tensor:
    kinds = (vector.shape, vector.dtype), (total.shape, total.dtype)
    assert kinds[0] == kinds[1], f"ranks send different vectors: {kinds}"
    return total.add_(vector)
