"""Reads the `.swanlab` file of a local run of SwanLab."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.format import Format, in_folder
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.analysis.readers.record_files import blobs_of
from channel_metrics.extras import need

__all__ = ["SWANLAB", "read_swanlab_file"]


def read_swanlab_file(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """Every scalar of the run."""
    module = "swanlab.proto.swanlab.record.v1.record_pb2"
    record_type: Any = need(module, extra="trackers").Record
    for number, blob in enumerate(blobs_of(path, b":SWL", problems, progress), 1):
        try:
            record = record_type.FromString(blob)
        except Exception as error:  # each protobuf has its own; the reader reports them
            problems.add(path, None, f"record {number} is damaged ({error})")
            continue
        if record.HasField("scalar"):
            scalar = record.scalar
            yield int(scalar.step), str(scalar.key), float(scalar.value.number)


SWANLAB = Format(
    name="swanlab",
    what=".swanlab file of SwanLab",
    read=read_swanlab_file,
    suffixes=(".swanlab",),
    starts=in_folder("*.swanlab", check=lambda path: ""),
    needs=("swanlab", "trackers"),
)
