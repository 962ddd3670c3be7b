"""Finds the logs in a file or a run folder, and their readers.

A folder often has the same numbers several times: as JSON, as event files, in a tracker. Only one
source is read, because two would count everything twice. It is the first in the order of `FORMATS`
that has values, or that of `format`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from channel_metrics.analysis.readers.csv_tables import CSV
from channel_metrics.analysis.readers.databases import MLFLOW_DB, TRACKIO
from channel_metrics.analysis.readers.event_files import TENSORBOARD
from channel_metrics.analysis.readers.files import is_regular
from channel_metrics.analysis.readers.format import OUTPUT_FOLDER, Files, Folder, Format
from channel_metrics.analysis.readers.json_logs import JSONL, TRAINER_LOG
from channel_metrics.analysis.readers.mlflow_files import MLFLOW
from channel_metrics.analysis.readers.parts import joined
from channel_metrics.analysis.readers.readings import (
    Problems,
    Progress,
    Reader,
    Reading,
)
from channel_metrics.analysis.readers.samples import SAMPLES
from channel_metrics.analysis.readers.swanlab_files import SWANLAB
from channel_metrics.analysis.readers.text_logs import TEXT
from channel_metrics.analysis.readers.trainer_state import TRAINER_STATE
from channel_metrics.analysis.readers.wandb_files import WANDB
from channel_metrics.errors import ChannelMetricsError

__all__ = ["FORMATS", "OUTPUT_FOLDER", "Source", "check_format", "find_sources", "pick_source"]

_ALL = (
    JSONL,
    TRAINER_STATE,
    TRAINER_LOG,
    TENSORBOARD,
    WANDB,
    MLFLOW,
    TRACKIO,
    SWANLAB,
    MLFLOW_DB,
    CSV,
    TEXT,
    SAMPLES,
)
FORMATS = tuple(format.name for format in _ALL)
# A file that is named by itself may be one of these, whatever its name.
_BY_CONTENT = (SAMPLES, JSONL, TEXT)
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    """The log of a run, in one format."""

    format: str
    """One of `FORMATS`."""

    files: Files
    """In the order in which they were written."""

    reader: Reader
    """Reads one of the files."""

    in_order: bool = True
    """Whether the readings of all keys come in the order of time."""

    missing: str = ""
    """How to install what the reader needs; empty if nothing is missing."""

    notes: tuple[str, ...] = ()
    """What was taken for what, and what was left aside."""

    def readings(self, problems: Problems, progress: Progress) -> Iterator[Reading]:
        """All readings of all files. Raises `ChannelMetricsError` if a package is missing."""
        if self.missing:
            raise ChannelMetricsError(f"{self.files[0]}: {self.missing}")
        for file in self.files:
            yield from self.reader(file, problems, progress)

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for file in self.files)


def check_format(format: str | None) -> None:
    """Raise `ChannelMetricsError` for a name that is no format."""
    if format is not None and format not in FORMATS:
        raise ChannelMetricsError(
            f"expected one of the formats {', '.join(FORMATS)}, but got {format!r}."
        )


def find_sources(run: Path) -> list[Source]:
    """All sources of `run`, the best first.

    A path may end with `#RUN`, for files with several runs. Raises `ChannelMetricsError` if there
    is no source.
    """
    path, _, run_id = str(run).partition("#") if not run.exists() else (str(run), "", "")
    root = Path(path)
    if not root.exists():
        raise ChannelMetricsError(f"expected a log or a run folder, but {run} does not exist.")
    if root.is_dir():
        return _of_folder(root)
    if not is_regular(root):
        raise ChannelMetricsError(f"expected a log or a run folder, but {run} is a pipe or device.")
    return [_of_file(root, run_id)]


def pick_source(run: Path, format: str | None = None) -> tuple[list[Source], list[str]]:
    """The sources to try, the best first, and the formats of all sources."""
    check_format(format)
    found = find_sources(run)
    formats = [source.format for source in found]
    wanted = [source for source in found if format in (None, source.format)]
    if not wanted:
        raise ChannelMetricsError(
            f"{run} has no log of format {format!r}, but {', '.join(formats)}."
        )
    return wanted, formats


def _of_folder(root: Path) -> list[Source]:
    folder = Folder(root)
    found = [_newest(format, runs) for format in _ALL if (runs := _runs(format, folder))]
    if not found:
        left = f" Left aside: {'; '.join(folder.notes[:_SHOWN])}." if folder.notes else ""
        raise ChannelMetricsError(
            f"{root} holds no log that can be read. Looked for: "
            f"{', '.join(format.what for format in _ALL)}.{left}"
        )
    return [replace(source, notes=(*source.notes, *folder.notes)) for source in found]


def _runs(format: Format, folder: Folder) -> list[Files]:
    try:
        return joined(format, format.starts(folder))
    except OSError as error:
        folder.note(f"{error.filename}: {error.strerror}")
        return []


def _newest(format: Format, runs: Sequence[Files]) -> Source:
    """The run that was written to last. The notes name the others."""
    files = max(runs, key=lambda files: max(file.stat().st_mtime for file in files))
    notes = []
    if len({file.parent if format is TENSORBOARD else file for file in files}) > 1:
        notes.append(f"joined as one run: {_listed(files)}")
    others = [other[-1] for other in runs if other is not files]
    if others:
        notes.append(f"other runs in the folder, read if you name them: {_listed(others)}")
    return Source(
        format=format.name,
        files=files,
        reader=format.read,
        in_order=format.in_order,
        missing=format.missing,
        notes=tuple(notes),
    )


def _listed(files: Sequence[Path]) -> str:
    more = f" and {len(files) - _SHOWN:,} more" if len(files) > _SHOWN else ""
    return ", ".join(str(file) for file in files[:_SHOWN]) + more


def _of_file(path: Path, run_id: str) -> Source:
    """The source that a file is. Raises `ChannelMetricsError` that says what was tried."""
    named = [format for format in _ALL if format.may_be(path)]
    # The most telling names first; then what a file without a telling name may be.
    tried: dict[str, str] = {}
    for format in dict.fromkeys([*_ranked(named), *_BY_CONTENT]):
        if reason := format.check(path):
            tried[format.name] = reason
            continue
        read: Callable[..., Iterator[Reading]] = format.read
        reader = partial(read, run_id=run_id) if run_id else format.read
        if run_id and format not in (CSV, MLFLOW_DB, TRACKIO):
            raise ChannelMetricsError(f"{path} holds one run; leave #{run_id} out.")
        return Source(
            format=format.name,
            files=(path,),
            reader=reader,
            in_order=format.in_order,
            missing=format.missing,
        )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in tried.items())
    raise ChannelMetricsError(f"{path} is no log that can be read. Tried {reasons}.")


def _ranked(formats: Sequence[Format]) -> list[Format]:
    """A log of samples is JSON lines, too, so it is looked at before them."""
    return sorted(formats, key=lambda format: (not format.names, format is not SAMPLES))
