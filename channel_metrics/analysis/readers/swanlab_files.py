"""Reads the `.swanlab` file of a local run of SwanLab.

The records are messages of protobuf. Versions 0.6 to 0.7 wrote JSON in their place, such as
`{"model_type": "Scalar", "data": {"key": "loss", "step": 1, "metric": {"data": 2.5}}}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.format import Format, in_folder
from channel_metrics.analysis.readers.json_logs import parse_object
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.analysis.readers.record_files import blobs_of, message_of
from channel_metrics.extras import need

__all__ = ["SWANLAB", "read_swanlab_file"]

# What SwanLab measures of the machine.
_OF_MACHINE = "__swanlab__."


def read_swanlab_file(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """Every scalar of the run."""
    for number, blob in enumerate(blobs_of(path, b":SWL", problems, progress), 1):
        read = _of_json if blob.startswith(b"{") else _of_message
        yield from read(blob, path, number, problems)


def _of_message(blob: bytes, path: Path, number: int, problems: Problems) -> Iterator[Reading]:
    module = "swanlab.proto.swanlab.record.v1.record_pb2"
    record_type: Any = need(module, extra="trackers").Record
    record = message_of(blob, record_type, path, number, problems)
    if record is not None and record.HasField("scalar"):
        scalar = record.scalar
        yield int(scalar.step), str(scalar.key), float(scalar.value.number)


def _of_json(blob: bytes, path: Path, number: int, problems: Problems) -> Iterator[Reading]:
    record = parse_object(blob.decode("utf-8", "replace"), path, number, problems) or {}
    if record.get("model_type") != "Scalar":
        return
    try:
        scalar = record["data"]
        key, step = str(scalar["key"]), int(scalar["step"])
        # A number that JSON does not have is a text.
        value = float(scalar["metric"]["data"])
    except (KeyError, TypeError, ValueError) as error:
        problems.add(path, None, f"record {number} is no scalar ({error!r})")
        return
    if not key.startswith(_OF_MACHINE):
        yield step, key, value


SWANLAB = Format(
    name="swanlab",
    what=".swanlab file of SwanLab",
    read=read_swanlab_file,
    suffixes=(".swanlab",),
    starts=in_folder("*.swanlab", check=lambda path: ""),
    needs=("swanlab", "trackers"),
)
