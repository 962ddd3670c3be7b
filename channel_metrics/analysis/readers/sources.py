"""Finds the logs in a file or a run folder, and their readers.

A folder often has the same numbers several times: as JSON, as event files, in a tracker. Only one
source is read, because two would count everything twice. It is the first in the order of
`_FINDERS`, or that of `format`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from channel_metrics.analysis.readers.event_files import read_event_file
from channel_metrics.analysis.readers.json_logs import (
    first_record,
    read_jsonl_log,
    read_trainer_state,
    step_of,
)
from channel_metrics.analysis.readers.readings import Problems, Progress, Reader, Reading
from channel_metrics.analysis.readers.samples import is_sample_record, read_sample_log
from channel_metrics.analysis.readers.text_logs import is_metric_line, read_text_log
from channel_metrics.analysis.readers.trackers import (
    read_mlflow_database,
    read_mlflow_metric,
    read_wandb_file,
)
from channel_metrics.errors import ChannelMetricsError

__all__ = ["FORMATS", "OUTPUT_FOLDER", "Source", "find_sources", "pick_source"]

# The default folder of results. It is not read as a run.
OUTPUT_FOLDER = "channel_analysis"

_LINES_TO_LOOK_AT = 2000


@dataclass(frozen=True, kw_only=True)
class Source:
    """The log of a run, in one format."""

    format: str
    """One of `FORMATS`."""

    files: tuple[Path, ...]
    """In the order in which they were written."""

    reader: Reader
    """Reads one of the files."""

    def readings(self, problems: Problems, progress: Progress) -> Iterator[Reading]:
        """All readings of all files."""
        for file in self.files:
            yield from self.reader(file, problems, progress)

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for file in self.files)


def find_sources(run: Path) -> list[Source]:
    """All sources of `run`, the best first.

    A path may end with `#RUN_ID`, for MLflow's database. Raises `ChannelMetricsError` if there is
    no source.
    """
    path, _, run_id = str(run).partition("#") if not run.exists() else (str(run), "", "")
    root = Path(path)
    if not root.exists():
        raise ChannelMetricsError(f"expected a log or a run folder, but {run} does not exist.")
    if root.is_file():
        found = [source] if (source := _of_file(root, run_id or None)) else []
    else:
        found = [
            Source(format=name, files=files, reader=_READERS[name])
            for name, find in _FINDERS.items()
            if (files := tuple(find(root)))
        ]
    if not found:
        raise ChannelMetricsError(
            f"{run} holds no log that can be read: expected logging.jsonl, trainer_state.json, "
            "TensorBoard event files, a .wandb file, an MLflow run, or a Megatron log."
        )
    return found


def pick_source(run: Path, format: str | None = None) -> tuple[Source, list[str]]:
    """The source to read, and the formats of the other sources."""
    found = find_sources(run)
    wanted = [source for source in found if format in (None, source.format)]
    if not wanted:
        raise ChannelMetricsError(
            f"{run} has no log of format {format!r}, but {', '.join(s.format for s in found)}."
        )
    return wanted[0], [source.format for source in found if source is not wanted[0]]


def _of_file(path: Path, run_id: str | None) -> Source | None:
    if path.name.startswith("events.out.tfevents"):
        name = "tensorboard"
    elif path.suffix == ".wandb":
        name = "wandb"
    elif path.suffix in (".db", ".sqlite", ".sqlite3"):
        reader = partial(read_mlflow_database, run_id=run_id)
        return Source(format="mlflow-db", files=(path,), reader=reader)
    elif path.suffix == ".json":
        name = "trainer_state"
    else:
        record = first_record(path)
        if is_sample_record(record):
            name = "samples"
        elif record is not None and step_of(record) is not None:
            name = "jsonl"
        elif _has_metric_lines(path):
            name = "text"
        else:
            return None
    return Source(format=name, files=(path,), reader=_READERS[name])


def _has_metric_lines(path: Path) -> bool:
    with path.open(errors="replace") as file:
        return any(map(is_metric_line, itertools.islice(file, _LINES_TO_LOOK_AT)))


def _jsonl(root: Path) -> Sequence[Path]:
    named = [root / "logging.jsonl", *sorted(root.glob("*/logging.jsonl"), key=_age)[::-1]]
    return [path for path in named if path.is_file()][:1] or _other_jsonl(root, "jsonl")


def _other_jsonl(root: Path, name: str) -> list[Path]:
    files = sorted(root.glob("*.jsonl"))
    sources = (_of_file(path, None) for path in files)
    return [s.files[0] for s in sources if s is not None and s.format == name][:1]


def _trainer_state(root: Path) -> Sequence[Path]:
    checkpoints = sorted(root.glob("checkpoint-*/trainer_state.json"), key=_checkpoint_step)
    found = [root / "trainer_state.json", *reversed(checkpoints)]
    return [path for path in found if path.is_file()][:1]


def _checkpoint_step(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _event_files(root: Path) -> Sequence[Path]:
    return sorted(
        (
            p
            for p in root.rglob("events.out.tfevents.*")
            if OUTPUT_FOLDER not in p.relative_to(root).parts
        ),
        key=_age,
    )


def _wandb(root: Path) -> Sequence[Path]:
    return sorted(root.rglob("*.wandb"), key=_age)[-1:]


def _mlflow(root: Path) -> Sequence[Path]:
    runs = sorted({path.parent for path in root.rglob("metrics") if path.is_dir()})
    runs = [run for run in runs if (run / "meta.yaml").is_file() and ".trash" not in run.parts]
    if len(runs) > 1:
        raise ChannelMetricsError(
            f"{root} holds {len(runs)} runs of MLflow, expected one; name its folder: "
            f"{', '.join(str(run) for run in runs[:8])}."
        )
    return [path for run in runs for path in sorted((run / "metrics").rglob("*")) if path.is_file()]


def _text(root: Path) -> Sequence[Path]:
    files = (p for suffix in ("log", "txt", "out") for p in sorted(root.glob(f"*.{suffix}")))
    return [path for path in files if _has_metric_lines(path)][:1]


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, str(path)


_FINDERS: dict[str, Callable[[Path], Sequence[Path]]] = {
    "jsonl": _jsonl,
    "trainer_state": _trainer_state,
    "tensorboard": _event_files,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "text": _text,
    "samples": partial(_other_jsonl, name="samples"),
}
_READERS: dict[str, Reader] = {
    "jsonl": read_jsonl_log,
    "trainer_state": read_trainer_state,
    "tensorboard": read_event_file,
    "wandb": read_wandb_file,
    "mlflow": read_mlflow_metric,
    "text": read_text_log,
    "samples": read_sample_log,
}
FORMATS = (*_READERS, "mlflow-db")
