"""Reads SQLite files: that of MLflow, and that of a project of Trackio.

A file may hold several runs. The newest is read, or the one that `FILE.db#RUN` names.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.format import Format, in_folder
from channel_metrics.analysis.readers.json_logs import parse_object, readings_of, step_of
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.errors import ChannelMetricsError

__all__ = ["MLFLOW_DB", "TRACKIO", "read_mlflow_database", "read_trackio_database"]

_SUFFIXES = (".db", ".sqlite", ".sqlite3")
_PATTERNS = tuple(f"*{suffix}" for suffix in _SUFFIXES)
_BYTES_PER_ROW = 64
_SHOWN = 8


def read_mlflow_database(
    path: Path, problems: Problems, progress: Progress, run_id: str | None = None
) -> Iterator[Reading]:
    """The metrics of one run of MLflow."""
    runs = "SELECT run_uuid FROM metrics GROUP BY run_uuid ORDER BY max(timestamp)"
    rows = "SELECT step, key, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY timestamp"
    for step, key, value, is_nan in _rows(path, runs, rows, run_id, problems):
        progress(_BYTES_PER_ROW)
        yield int(step), str(key), float("nan") if is_nan else float(value)


def read_trackio_database(
    path: Path, problems: Problems, progress: Progress, run_id: str | None = None
) -> Iterator[Reading]:
    """The metrics of one run of Trackio. Its own steps count calls, so others come first."""
    runs = "SELECT run_name FROM metrics GROUP BY run_name ORDER BY max(id)"
    rows = "SELECT id, step, metrics FROM metrics WHERE run_name = ? ORDER BY id"
    for number, calls, text in _rows(path, runs, rows, run_id, problems):
        progress(len(text))
        record = parse_object(text, path, number, problems) or {}
        step = step_of(record | {"_step": calls})
        yield from readings_of(record, calls if step is None else step, problems)


def _rows(
    path: Path, runs: str, rows: str, run_id: str | None, problems: Problems
) -> Iterator[tuple[Any, ...]]:
    """The rows of one run.

    Args:
        path: the file.
        runs: selects the names of all runs, the newest last.
        rows: selects the rows of a run, given its name.
        run_id: the name of the run; by default the newest.
        problems: where a note on other runs, or a problem with the file, goes.
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            names = [row[0] for row in database.execute(runs)]
            if run_id is not None and run_id not in names:
                raise ChannelMetricsError(
                    f"{path} has no run {run_id!r}; there are {', '.join(names[-_SHOWN:])}."
                )
            run_id = run_id or (names or [""])[-1]
            others = [name for name in names if name != run_id]
            if others:
                problems.note(
                    f"{path.name} has {len(names)} runs; this is {run_id}. Others are read as "
                    f"{path.name}#RUN, with one of {', '.join(others[-_SHOWN:])}"
                )
            yield from database.execute(rows, (run_id,))
    except sqlite3.Error as error:
        problems.add(path, None, f"cannot be read as a database ({error})")


def _lacks(column: str) -> Callable[[Path], str]:
    """Says whether the table of metrics lacks a column."""

    def check(path: Path) -> str:
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as opened:
                columns = [row[1] for row in opened.execute("PRAGMA table_info(metrics)")]
        except sqlite3.Error as error:
            return f"it is no SQLite file ({error})"
        return "" if column in columns else f"it has no table metrics with a column {column}"

    return check


MLFLOW_DB = Format(
    name="mlflow-db",
    what="SQLite file of MLflow",
    read=read_mlflow_database,
    check=_lacks("is_nan"),
    suffixes=_SUFFIXES,
    starts=in_folder(*_PATTERNS, check=_lacks("is_nan"), depth=3),
)
TRACKIO = Format(
    name="trackio",
    what="SQLite file of a project of Trackio",
    read=read_trackio_database,
    check=_lacks("run_name"),
    suffixes=_SUFFIXES,
    starts=in_folder(*_PATTERNS, check=_lacks("run_name"), depth=3),
)
