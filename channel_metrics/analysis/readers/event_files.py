"""Reads TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.format import Files, Folder, Format
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.analysis.readers.record_files import message_of
from channel_metrics.extras import need

__all__ = ["TENSORBOARD", "read_event_file"]

# The bytes around a record: its length, and the checksums of the length and of the record.
_FRAME_BYTES = 16


def read_event_file(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """Every scalar of one event file. TensorBoard stores float32, so values have 7 digits."""
    need("tensorboard", extra="report")
    loader: Any = need(
        "tensorboard.backend.event_processing.event_file_loader", extra="report"
    ).RawEventFileLoader(str(path))
    event_type: Any = need("tensorboard.compat.proto.event_pb2", extra="report").Event
    read = 0
    for number, record in enumerate(loader.Load(), 1):
        read += len(record) + _FRAME_BYTES
        progress(len(record) + _FRAME_BYTES)
        event = message_of(record, event_type, path, number, problems)
        if event is not None and event.HasField("summary"):
            for value in event.summary.value:
                scalar = _scalar(value)
                if scalar is not None:
                    yield int(event.step), value.tag, scalar
    size = path.stat().st_size
    if read < size:
        problems.add(
            path,
            None,
            f"ends at byte {read:,} of {size:,}: the rest is damaged, or is being written",
        )


def _scalar(value: Any) -> float | None:
    """The number of a summary value; None for a histogram, a text, an image."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor") or value.metadata.plugin_data.plugin_name not in (
        "",
        "scalars",
    ):
        return None
    array = need("tensorboard.util.tensor_util", extra="report").make_ndarray(value.tensor)
    return float(array) if array.ndim == 0 and array.dtype.kind in "fiu" else None


def _starts(folder: Folder) -> list[Files]:
    """A folder of event files is one start: a job writes into one folder."""
    found: dict[Path, list[Path]] = {}
    for path in folder.named("events.out.tfevents.*"):
        found.setdefault(path.parent, []).append(path)
    return [tuple(files) for files in found.values()]


TENSORBOARD = Format(
    name="tensorboard",
    what="event files of TensorBoard",
    read=read_event_file,
    names=("events.out.tfevents.*",),
    starts=_starts,
    needs=("tensorboard", "report"),
)
