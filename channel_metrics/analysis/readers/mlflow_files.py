"""Reads the file store of MLflow: a folder per run, and in it a file per metric."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from channel_metrics.analysis.readers.format import Files, Folder, Format
from channel_metrics.analysis.readers.lines import lines_of
from channel_metrics.analysis.readers.readings import MAX_STEP, Problems, Progress, Reading

__all__ = ["MLFLOW", "read_mlflow_metric"]


def read_mlflow_metric(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """One metric of MLflow's file store. Lines are `time value step`; the path is the key."""
    parts = path.parts
    start = len(parts) - parts[::-1].index("metrics")
    key = "/".join(parts[start:])
    for number, line in lines_of(path, problems, progress):
        try:
            _, value, step = line.split()[:3]
            reading = int(step), key, float(value)
        except ValueError:
            problems.add(path, number, "is not `time value step`")
            continue
        if abs(reading[0]) > MAX_STEP:
            problems.add(path, number, "has a step larger than 2**53")
            continue
        yield reading


def _runs(folder: Folder) -> list[Files]:
    runs = {path.parent for path in folder.named("meta.yaml") if ".trash" not in path.parts}
    found: dict[Path, list[Path]] = {}
    for path in folder.named("*") if runs else ():
        # A key may have slashes, so its file may lie deeper.
        metrics = next((parent for parent in path.parents if parent.name == "metrics"), None)
        if metrics is not None and metrics.parent in runs:
            found.setdefault(metrics.parent, []).append(path)
    starts = [tuple(files) for files in found.values()]
    return sorted(starts, key=lambda files: max(file.stat().st_mtime for file in files))


MLFLOW = Format(
    name="mlflow",
    what="run of MLflow's file store",
    read=read_mlflow_metric,
    starts=_runs,
    in_order=False,
)
