"""`MixedStream`: an endless dataset that draws its records from several sources by weights.

    stream = MixedStream({"bbu": bbu, "rru": rru}, batch_size=8)
    metrics = ChannelMetrics(MetricsConfig(sampler={"start": {"bbu": 3, "rru": 1}}))
    stream.follow(metrics)

The records of all ranks and workers are one sequence of draws, numbered from 0. Each process
computes the channel of every draw, and reads only the records of its own ones. Draw number n
depends on the seed and on the weights that hold from some number on, not on time. So the
sequence is the same with any number of workers, and in each repetition of a run.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from channel_metrics.errors import ConfigError

__all__ = ["Follower", "MixedStream", "Plan"]

# Changes that a worker may be behind, workers of a rank, and random numbers that are made at once.
_ROWS, _WORKERS, _CHUNK = 4096, 1024, 256

# The number of a draw, and the weights that hold from it on.
Entry = tuple[int, list[float]]


class Plan:
    """Which weights hold from which draw on. Changes are in shared memory, so workers see them.

    names: of the channels. spread: the draws of one batch of all ranks.

    Attributes:
        entries: in order; the first one holds at `position`.
        position: the draw that an iteration begins with.
        counts: how often each channel was drawn before it.
        drawn: for each worker, the draws up to its last record.
    """

    def __init__(self, names: Sequence[str], spread: int) -> None:
        self.names, self.spread = tuple(names), spread
        self.entries: list[Entry] = []
        self.position, self.counts = 0, [0] * len(self.names)
        self.drawn = torch.zeros(_WORKERS, dtype=torch.int64, device="cpu").share_memory_()
        shape = (_ROWS, len(self.names) + 1)
        self._rows = torch.zeros(shape, dtype=torch.float64, device="cpu").share_memory_()
        self._changes = torch.zeros(1, dtype=torch.int64, device="cpu").share_memory_()
        # How many changes are in `entries`. A worker has a copy of both.
        self._seen = 0

    def begin(self, entries: list[Entry], position: int, counts: Sequence[int]) -> None:
        """Set everything, for iterations that begin from now on."""
        self.entries = entries
        self.move(position, counts)
        self.drawn.zero_()

    def move(self, position: int, counts: Sequence[int]) -> None:
        """Let iterations begin at a later draw."""
        self.position, self.counts = position, [*counts]
        while len(self.entries) > 1 and self.entries[1][0] <= position:
            del self.entries[0]

    def change(self, draw: int, weights: list[float]) -> None:
        """Let weights hold from a draw on."""
        self.entries.append((draw, weights))
        row = torch.tensor([draw, *weights], dtype=torch.float64, device="cpu")
        self._rows[self._seen % _ROWS] = row
        self._changes += 1  # last: then the row is complete
        self._seen += 1

    def at(self, draw: int) -> list[float]:
        """The weights that hold for a draw."""
        return [weights for start, weights in self.entries if start <= draw][-1]

    def changes(self) -> Iterator[list[Entry]]:
        """For an iteration: at each `next`, the entries that are new."""
        seen, new = self._seen, [*self.entries]
        while True:
            yield new
            rows = [self._rows[n % _ROWS].tolist() for n in range(seen, int(self._changes))]
            new = [(int(start), weights) for start, *weights in rows]
            seen += len(rows)


class Follower(Protocol):
    """What the stream asks of the sampler of a `ChannelMetrics`."""

    def drive(self, plan: Plan, lag: int) -> None:
        """Change this plan from now on."""


class MixedStream(IterableDataset[Any]):
    """Draws records from sources by the weights of a `ChannelMetrics` with the setting `sampler`.

    Each source gives all its records once, in random order, before it gives one again. There is
    no end. An iteration begins behind the last record that a closed window has counted.

    Args:
        sources: {channel: records that can be indexed and have a length}.
        seed: of the draws and of the orders.
        batch_size: how many draws in a row belong to one rank and worker: the `batch_size` of the
            data loader.
        lag: a change holds from so many draws after the last one that was trained on. Loaders
            read ahead by prefetch_factor * num_workers batches of all ranks; transformers and
            Lightning by one more. If it is too small, an error says so.
        rank, ranks: if each rank reads the stream itself, and nothing divides it: which one
            this is. Leave them out where the trainer divides it, as transformers does.
        field: the key of a record that is set to the channel; empty: records have it already.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        *,
        seed: int = 0,
        batch_size: int = 1,
        lag: int = 0,
        rank: int = 0,
        ranks: int = 1,
        field: str = "channel",
    ) -> None:
        for name, source in sources.items():
            if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
                raise ConfigError(
                    f"source {name!r} must have a length and be indexed, as a list or a "
                    f"`datasets.Dataset`, but is {type(source).__name__}."
                )
            if not len(source):
                raise ConfigError(f"source {name!r} has no records; remove it.")
        if batch_size < 1 or lag < 0 or not 0 <= rank < ranks:
            raise ConfigError(
                "batch_size must be 1 or more, lag 0 or more, and rank below ranks, but they are "
                f"{batch_size}, {lag}, {rank} and {ranks}."
            )
        self.sources, self.seed, self.field = dict(sources), seed, field
        self.batch_size, self.lag, self.rank, self.ranks = batch_size, lag, rank, ranks
        self.plan = Plan(list(self.sources), batch_size * ranks)

    def follow(self, metrics: Any) -> None:
        """Follow the weights of a session. Call it before the training.

        Args:
            metrics: a `ChannelMetrics`, such as `trainer.channel_metrics`.

        Raises:
            ConfigError: its config has no `sampler`, or one for other channels.
        """
        sampler: Follower | None = metrics.sampler
        if sampler is None:
            raise ConfigError(
                "a MixedStream follows the setting `sampler`, which the config of these metrics "
                "does not have; add sampler: {start: {CHANNEL: 1, ...}}."
            )
        sampler.drive(self.plan, self.lag)

    def __iter__(self) -> Iterator[Any]:
        """The records of this rank and worker, without an end."""
        plan, info = self.plan, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if not plan.entries:
            # TRL looks at one record when it is made, which is before a session can be.
            yield self._record(0, 0, {})
            raise ConfigError(
                "nothing tells a MixedStream its weights; call stream.follow(metrics) before the "
                "training."
            )
        if info and self.lag < workers * self.plan.spread:
            raise ConfigError(
                f"num_workers of the loader is {workers}, so the lag of a MixedStream must be at "
                f"least prefetch_factor * {workers} batches of {self.plan.spread} records, but is "
                f"{self.lag}."
            )
        own, shards = self.rank + self.ranks * worker, self.ranks * workers
        entries, changes = list[Entry](), plan.changes()
        counts, sums, orders = [*plan.counts], list[float](), dict[int, tuple[int, Tensor]]()
        draw = first = plan.position
        values = self._random(draw)
        entries += next(changes)
        while True:
            while entries and entries[0][0] <= draw:
                sums = [*accumulate(entries.pop(0)[1])]
            if draw % _CHUNK == 0:
                values = self._random(draw)
            channel = min(bisect(sums, values[draw % _CHUNK] * sums[-1]), len(sums) - 1)
            if (draw - first) // self.batch_size % shards == own:
                plan.drawn[worker] = draw + 1
                yield self._record(channel, counts[channel], orders)
                entries += next(changes)
            counts[channel] += 1
            draw += 1

    def _random(self, draw: int) -> list[float]:
        """The random numbers of the chunk of a draw."""
        made = random.Random(f"{self.seed} {draw // _CHUNK}")
        return [made.random() for _ in range(_CHUNK)]

    def _record(self, channel: int, number: int, orders: dict[int, tuple[int, Tensor]]) -> Any:
        """The record of a channel that comes after `number` others.

        orders: {channel: (turn, order of the source in it)}, those that were made before.
        """
        name = self.plan.names[channel]
        source = self.sources[name]
        turn, place = divmod(number, len(source))
        if orders.get(channel, (-1,))[0] != turn:
            made = torch.Generator(device="cpu")
            made.manual_seed(random.Random(f"{self.seed} {name} {turn}").getrandbits(63))
            orders[channel] = turn, torch.randperm(len(source), generator=made, device="cpu")
        record = source[int(orders[channel][1][place])]
        return {**record, self.field: name} if self.field else record
