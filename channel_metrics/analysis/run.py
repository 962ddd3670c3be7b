"""A run that was read from its log: series by channel, metric and split.

>>> run = load_run(Path("runs/debug"))                         # doctest: +SKIP
>>> steps, values = run.series("bbu", "loss")                  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from channel_metrics.analysis.alerts import RunAlert, alerts_of
from channel_metrics.analysis.axes import axis_of, without_labels
from channel_metrics.analysis.readers.keys import Key, decode_keys
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.analysis.readers.sources import pick_source
from channel_metrics.analysis.store import SeriesStore, store_of
from channel_metrics.core.labels import UNLABELED
from channel_metrics.errors import ChannelMetricsError

if TYPE_CHECKING:
    from channel_metrics.analysis.store import Steps, Values

__all__ = [
    "RUN_FILE",
    "Run",
    "configured_ratios",
    "folder_of",
    "load_run",
    "run_from_readings",
    "run_names",
]

# `channel-metrics train` writes the configured ratios and the sizes of the sources into this file
# of the run folder.
RUN_FILE = "channel_metrics_run.json"

# So many resumes are named in a note.
_MAX_RESUMES = 5


@dataclass(frozen=True, kw_only=True)
class Run:
    """All series of a log."""

    name: str
    """The name that is shown."""

    origin: str
    """The file and the format that it was read from."""

    problems: Problems
    """Places that could not be read, and notes."""

    store: SeriesStore = field(repr=False)
    """The readings, by the keys of the log."""

    meanings: dict[str | Key, Key] = field(repr=False)
    """{key of the log: its meaning}"""

    labels: dict[str | Key, Key] = field(default_factory=dict, repr=False)
    """The same for labels of axes such as `domain/target`, see `axes`. They are no channels."""

    axis: str = ""
    """The axis whose labels are shown as channels, if any."""

    ratios: dict[str, float] = field(default_factory=dict)
    """The configured ratios of the records, by channel, relative to each other."""

    records: dict[str, int] = field(default_factory=dict)
    """The number of different records of each source, by channel, if the run folder tells it."""

    alerts: tuple[RunAlert, ...] = ()
    """What the run itself has told of, see docs/acting.md."""

    @property
    def keys(self) -> tuple[Key, ...]:
        """The meanings of all series."""
        return tuple(self.meanings.values())

    @cached_property
    def _key_of(self) -> dict[Key, str | Key]:
        return {meaning: key for key, meaning in self.meanings.items()}

    def channels(self, split: str | None = None) -> list[str]:
        """Names of channels in the order of the log; `unlabeled` is last."""
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

    @property
    def axes(self) -> list[str]:
        """The axes that the log has labels of, besides the channel."""
        return list(dict.fromkeys(axis_of(means.channel) for means in self.labels.values()))

    @property
    def resumes(self) -> tuple[int, ...]:
        """The first steps after each resume that the log shows."""
        return self.store.resumes

    def overwritten(self, channel: str, metric: str, split: str = "train") -> tuple[Steps, Values]:
        """The values that were logged for steps which a resume has done again."""
        import numpy as np

        key = self._key_of.get(Key(split, channel, metric))
        return (
            (np.empty(0, dtype=np.int64), np.empty(0))
            if key is None
            else self.store.overwritten(key)
        )

    def all_series(self) -> Iterator[tuple[Key, Steps, Values]]:
        """Every series with its meaning; labels of axes, too."""
        for key, meaning in (self.meanings | self.labels).items():
            steps, values = self.store.series(key)
            yield meaning, steps, values


def load_run(
    path: Path,
    *,
    format: str | None = None,
    channels: Iterable[str] = (),
    progress: Progress = lambda _: None,
    expect: Callable[[int], object] = lambda _: None,
) -> Run:
    """Read a log.

    Args:
        path: a log file, or a run folder, see `sources`.
        format: which log to read, if a folder has several.
        channels: names that are channels. By default, they are inferred from the keys.
        progress: is called with the number of bytes that were read.
        expect: is called with the size of a log before it is read.

    Raises:
        ChannelMetricsError: if there is no log, or no value in it.
    """
    sources, formats = pick_source(path, format)
    notes: list[str] = []
    for number, source in enumerate(sources, 1):
        if source.missing and number < len(sources):
            notes = [*notes, f"{source.files[-1]} was left aside: {source.missing}"]
            continue
        problems = Problems(notes=notes)
        expect(source.num_bytes)
        store = store_of(source.readings(problems, progress), in_order=source.in_order)
        if len(store) or number == len(sources):
            break
        notes = [*notes, f"{source.files[-1]} holds no values ({source.format})"]
    ratios = configured_ratios(path, problems)
    others = [name for name in formats if name != source.format]
    if others:
        problems.note(f"read as {source.format}; the run also has {', '.join(others)}")
    for note in source.notes:
        problems.note(note)
    files = f" ({len(source.files)} files)" if len(source.files) > 1 else ""
    run = _run_of(
        store,
        name=path.resolve().name,
        origin=f"{source.files[-1]}{files}, {source.format}",
        problems=problems,
        channels=[*channels, *ratios],
        ratios=ratios,
        records=_source_sizes(path),
    )
    return replace(run, alerts=tuple(alerts_of(path)))


def run_from_readings(
    readings: Iterable[Reading],
    *,
    name: str,
    origin: str,
    problems: Problems,
    channels: Iterable[str] = (),
    ratios: dict[str, float] | None = None,
) -> Run:
    """A run from the readings of a reader."""
    return _run_of(
        store_of(readings),
        name=name,
        origin=origin,
        problems=problems,
        channels=channels,
        ratios=ratios,
    )


def _run_of(
    store: SeriesStore,
    *,
    name: str,
    origin: str,
    problems: Problems,
    channels: Iterable[str],
    ratios: dict[str, float] | None,
    records: dict[str, int] | None = None,
) -> Run:
    if not len(store):
        first = f" The first problem: {problems.examples[0]}" if problems.examples else ""
        raise ChannelMetricsError(f"expected values in {origin}, but there are none.{first}")
    channels = [*channels]
    meanings = decode_keys(store.keys, [*channels, UNLABELED] if channels else ())
    if store.resumes:
        before = sum(len(store.overwritten(key)[0]) for key in store.keys)
        steps = ", ".join(f"{step:,}" for step in store.resumes[:_MAX_RESUMES])
        more = "" if len(store.resumes) <= _MAX_RESUMES else " and later"
        problems.note(
            f"the log goes back to step {steps}{more}, as after a resume: {before:,} values that "
            "were logged before are left out"
        )
    # Only channels are counted: trainers repeat their own values, such as the epoch.
    repeated = sum(store.num_repeated(key) for key, means in meanings.items() if means.channel)
    if repeated:
        problems.note(f"{repeated} values were logged twice for one step; the last counts")
    if problems.null_losses:
        problems.note(
            f"{problems.null_losses:,} losses are null in the log, which may mean NaN or no value; "
            "they are left out"
        )
    run = Run(
        name=name,
        origin=origin,
        problems=problems,
        store=store,
        meanings=meanings,
        ratios=ratios or {},
        records=records or {},
    )
    return without_labels(run, declared=channels)


def run_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each path; all names differ."""
    parts = [path.resolve().parts for path in paths]
    names = ["/".join(part[-1:]) for part in parts]
    depth = 1
    while len(set(names)) < len(names) and depth < max(map(len, parts)):
        depth += 1
        names = ["/".join(part[-depth:]) for part in parts]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def folder_of(path: Path) -> Path:
    """The folder of a run, given the folder or a log in it."""
    return path if path.is_dir() else path.parent


def configured_ratios(path: Path, problems: Problems) -> dict[str, float]:
    """The configured ratios in the run folder; empty if there are none."""
    file = folder_of(path) / RUN_FILE
    if not file.is_file():
        return {}
    try:
        ratios = json.loads(file.read_text(encoding="utf-8"))["ratios"]
        return {str(name): float(ratio) for name, ratio in ratios.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.add(file, None, f"cannot be read ({error!r})")
        return {}


def _source_sizes(path: Path) -> dict[str, int]:
    """The sizes of the sources in the run folder; empty if there are none."""
    file = folder_of(path) / RUN_FILE
    try:
        records = json.loads(file.read_text(encoding="utf-8"))["records"]
        return {str(name): int(count) for name, count in records.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # `configured_ratios` tells what is wrong with the file. Older ones have no sizes.
        return {}
