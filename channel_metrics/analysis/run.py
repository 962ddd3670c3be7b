"""A run, read: series by channel, metric and split.

>>> run = load_run(Path("runs/debug"))                         # doctest: +SKIP
>>> steps, values = run.series("bbu", "loss")                  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from channel_metrics.analysis.readers.keys import GLOBAL, Key, decode_keys
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.analysis.readers.sources import pick_source
from channel_metrics.analysis.store import SeriesStore, SeriesWriter
from channel_metrics.core.labels import UNLABELED
from channel_metrics.errors import ChannelMetricsError

if TYPE_CHECKING:
    from channel_metrics.analysis.store import Steps, Values

__all__ = [
    "RUN_FILE",
    "Run",
    "configured_ratios",
    "global_loss",
    "load_run",
    "run_from_readings",
    "run_names",
]

# Written by `channel-metrics train` into the run folder: what was configured.
RUN_FILE = "channel_metrics_run.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a log holds, in order."""

    name: str
    """For people: tells runs apart."""

    origin: str
    """Where it was read from, and in which format."""

    problems: Problems
    """What could not be read, and notes."""

    store: SeriesStore = field(repr=False)
    """The readings, by the keys of the log."""

    meanings: dict[str | Key, Key] = field(repr=False)
    """What the keys mean."""

    ratios: dict[str, float] = field(default_factory=dict)
    """The configured mix, channel by channel, relative to each other; of records."""

    @property
    def keys(self) -> tuple[Key, ...]:
        """All series."""
        return tuple(self.meanings.values())

    @cached_property
    def _key_of(self) -> dict[Key, str | Key]:
        return {meaning: key for key, meaning in self.meanings.items()}

    def channels(self, split: str | None = None) -> list[str]:
        """Names in the order of the log; `unlabeled` last."""
        names = dict.fromkeys(
            key.channel for key in self.keys if key.channel and split in (None, key.split)
        )
        return sorted(names, key=lambda name: name == UNLABELED)

    def has(self, channel: str, metric: str, split: str = "train") -> bool:
        """Whether there is such a series."""
        return Key(split, channel, metric) in self._key_of

    def series(self, channel: str, metric: str, split: str = "train") -> tuple[Steps, Values]:
        """Steps int64 [N], strictly increasing, and values float64 [N]; empty if there are none."""
        key = self._key_of.get(Key(split, channel, metric))
        if key is None:
            import numpy as np

            return np.empty(0, dtype=np.int64), np.empty(0)
        return self.store.series(key)

    def all_series(self) -> Iterator[tuple[Key, Steps, Values]]:
        """Every series with its meaning."""
        for key, meaning in self.meanings.items():
            steps, values = self.store.series(key)
            yield meaning, steps, values


def load_run(
    path: Path,
    *,
    format: str | None = None,
    channels: Iterable[str] = (),
    progress: Progress = lambda _: None,
) -> Run:
    """Read the log that `path` is or holds, see `sources`.

    format: which log, where a folder has several. channels: names that are channels, where the
    keys leave that open. Raises `ChannelMetricsError` if nothing is there or nothing is in it.
    """
    source, others = pick_source(path, format)
    problems = Problems()
    ratios = configured_ratios(path, problems)
    if others:
        problems.note(f"read as {source.format}; the run also has {', '.join(others)}")
    files = f" ({len(source.files)} files)" if len(source.files) > 1 else ""
    return run_from_readings(
        source.readings(problems, progress),
        name=path.resolve().name,
        origin=f"{source.files[-1]}{files}, {source.format}",
        problems=problems,
        channels=[*channels, *(name for name in ratios)],
        ratios=ratios,
    )


def run_from_readings(
    readings: Iterable[Reading],
    *,
    name: str,
    origin: str,
    problems: Problems,
    channels: Iterable[str] = (),
    ratios: dict[str, float] | None = None,
) -> Run:
    """A run of what a reader gives."""
    with SeriesWriter() as writer:
        for step, key, value in readings:
            writer.add(step, key, value)
        store = writer.finish()
    if not len(store):
        first = f" The first problem: {problems.examples[0]}" if problems.examples else ""
        raise ChannelMetricsError(f"expected values in {origin}, but there are none.{first}")
    meanings = decode_keys(store.keys, [*channels, UNLABELED] if (channels := [*channels]) else ())
    # The trainer's own values, such as the epoch, are logged with each evaluation, too.
    repeated = sum(store.num_repeated(key) for key, means in meanings.items() if means.channel)
    if repeated:
        problems.note(
            f"{repeated} values stand there twice for one step, as after a resume; the last counts"
        )
    return Run(
        name=name,
        origin=origin,
        problems=problems,
        store=store,
        meanings=meanings,
        ratios=ratios or {},
    )


def run_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each path, different from those of the others."""
    parts = [path.resolve().parts for path in paths]
    names = ["/".join(part[-1:]) for part in parts]
    depth = 1
    while len(set(names)) < len(names) and depth < max(map(len, parts)):
        depth += 1
        names = ["/".join(part[-depth:]) for part in parts]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def global_loss(run: Run, split: str = "train") -> tuple[Steps, Values]:
    """The trainer's own loss."""
    return run.series(GLOBAL, "loss", split)


def configured_ratios(path: Path, problems: Problems) -> dict[str, float]:
    """The mix that stands beside the log; empty if none does."""
    folder = path if path.is_dir() else path.parent
    file = folder / RUN_FILE
    if not file.is_file():
        return {}
    try:
        ratios = json.loads(file.read_text(encoding="utf-8"))["ratios"]
        return {str(name): float(ratio) for name, ratio in ratios.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.add(file, None, f"cannot be read ({error!r})")
        return {}
