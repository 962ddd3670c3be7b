"""Records in LevelDB's log format, which W&B and SwanLab write."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.readings import Problems, Progress

__all__ = ["blobs_of", "message_of"]

_HEADER_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_FRAME = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _LAST = 1, 4


def blobs_of(path: Path, magic: bytes, problems: Problems, progress: Progress) -> Iterator[bytes]:
    """The records of a file, put together from their parts. magic: how the file begins."""
    with path.open("rb") as file:
        if file.read(_HEADER_BYTES)[: len(magic)] != magic:
            problems.add(path, None, f"does not begin with {magic.decode()}")
            return
        position, parts = _HEADER_BYTES, b""
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


def message_of(
    blob: bytes, message_type: Any, path: Path, number: int, problems: Problems
) -> Any | None:
    """A message of protobuf; None, with a problem, if the record is damaged."""
    try:
        return message_type.FromString(blob)
    except Exception as error:  # protobuf's C and Python code raise different ones
        problems.add(path, None, f"record {number} is damaged ({error})")
        return None
