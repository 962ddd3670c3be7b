"""Reads the `.wandb` file of a local run of W&B."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.format import Format, in_folder
from channel_metrics.analysis.readers.json_logs import readings_of, step_of
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.analysis.readers.record_files import blobs_of, message_of
from channel_metrics.extras import need

__all__ = ["WANDB", "read_wandb_file"]


def read_wandb_file(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """Every number in the history."""
    record_type: Any = need("wandb.proto.wandb_internal_pb2", extra="trackers").Record
    for number, blob in enumerate(blobs_of(path, b":W&B", problems, progress), 1):
        record = message_of(blob, record_type, path, number, problems)
        if record is not None and record.WhichOneof("record_type") == "history":
            entry = _history_entry(record.history, path, number, problems)
            step = step_of(entry)
            if step is None:
                problems.add(path, None, f"record {number} has no step")
            else:
                named = {k: v for k, v in entry.items() if not k.startswith("_")}
                yield from readings_of(named, step, problems)


def _history_entry(history: Any, path: Path, number: int, problems: Problems) -> dict[str, Any]:
    entry = {}
    for item in history.item:
        try:
            entry[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        except ValueError as error:
            problems.add(path, None, f"record {number} holds no JSON ({error})")
    return {"_step": int(history.step.num)} | entry


WANDB = Format(
    name="wandb",
    what=".wandb file of W&B",
    read=read_wandb_file,
    suffixes=(".wandb",),
    starts=in_folder("*.wandb", check=lambda path: ""),
    needs=("wandb", "trackers"),
)
