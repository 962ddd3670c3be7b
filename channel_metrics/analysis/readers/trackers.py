"""Reads local runs of trackers: W&B's offline file, MLflow's file store and its SQLite file."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from channel_metrics.analysis.readers.json_logs import readings_of, step_of
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading, lines_of
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.extras import need

__all__ = ["read_mlflow_database", "read_mlflow_metric", "read_wandb_file"]

_WANDB_HEADER_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_FRAME = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _LAST = 1, 4


def read_wandb_file(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """Every number in the history of a `.wandb` file (LevelDB's log format around protobuf)."""
    record_type: Any = need("wandb.proto.wandb_internal_pb2", extra="trackers").Record
    with path.open("rb") as file:
        for number, blob in enumerate(_wandb_records(file, path, problems, progress), 1):
            try:
                record = record_type.FromString(blob)
            except Exception as error:  # each protobuf has its own; the reader reports them
                problems.add(path, None, f"record {number} is damaged ({error})")
                continue
            if record.WhichOneof("record_type") == "history":
                entry = _history_entry(record.history, path, number, problems)
                step = step_of(entry)
                if step is None:
                    problems.add(path, None, f"record {number} has no step")
                else:
                    named = {k: v for k, v in entry.items() if not k.startswith("_")}
                    yield from readings_of(named, step)


def _history_entry(history: Any, path: Path, number: int, problems: Problems) -> dict[str, Any]:
    entry = {}
    for item in history.item:
        try:
            entry[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        except ValueError as error:
            problems.add(path, None, f"record {number} holds no JSON ({error})")
    return {"_step": int(history.step.num)} | entry


def _wandb_records(
    file: BinaryIO, path: Path, problems: Problems, progress: Progress
) -> Iterator[bytes]:
    """The records of the file, put together from their parts."""
    if file.read(_WANDB_HEADER_BYTES)[:4] != b":W&B":
        problems.add(path, None, "does not begin as a W&B file")
        return
    position, parts = _WANDB_HEADER_BYTES, b""
    while True:
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _FRAME.size:
            position += len(file.read(left))
            continue
        header = file.read(_FRAME.size)
        if len(header) < _FRAME.size:
            return
        _, length, kind = _FRAME.unpack(header)
        body = file.read(length)
        position += len(header) + len(body)
        progress(len(header) + len(body))
        if len(body) < length or not kind:
            problems.add(path, None, f"is cut off or damaged at byte {position:,}")
            return
        parts += body
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""


def read_mlflow_metric(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """One metric of MLflow's file store. Lines are `time value step`; the path is the key."""
    parts = path.parts
    start = len(parts) - parts[::-1].index("metrics")
    key = "/".join(parts[start:])
    for number, line in lines_of(path, problems, progress):
        try:
            _, value, step = line.split()[:3]
            yield int(step), key, float(value)
        except ValueError:
            problems.add(path, number, "is not `time value step`")


def read_mlflow_database(
    path: Path, problems: Problems, progress: Progress, run_id: str | None = None
) -> Iterator[Reading]:
    """The metrics of one run in MLflow's SQLite file; without `run_id`, of the only one in it."""
    uri = f"{path.resolve().as_uri()}?mode=ro"
    try:
        with sqlite3.connect(uri, uri=True) as database:
            runs = [row[0] for row in database.execute("SELECT DISTINCT run_uuid FROM metrics")]
            if run_id is None and len(runs) > 1:
                raise ChannelMetricsError(
                    f"{path} holds {len(runs)} runs, expected one; name it as "
                    f"{path}#RUN_ID, with one of {', '.join(runs[:8])}."
                )
            rows = database.execute(
                "SELECT step, key, value, is_nan FROM metrics WHERE run_uuid = ? "
                "ORDER BY timestamp",
                (run_id or (runs or [""])[0],),
            )
            for step, key, value, is_nan in rows:
                progress(64)
                yield int(step), str(key), float("nan") if is_nan else float(value)
    except sqlite3.DatabaseError as error:
        problems.add(path, None, f"is no database of MLflow ({error})")
