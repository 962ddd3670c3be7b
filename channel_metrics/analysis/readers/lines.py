"""The lines of a log file of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from channel_metrics.analysis.readers.files import open_log
from channel_metrics.analysis.readers.readings import MAX_LINE_BYTES, Problems, Progress

__all__ = ["lines_of"]


def lines_of(path: Path, problems: Problems, progress: Progress) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line that is not blank.

    Bytes that are no UTF-8 are replaced.
    """
    with open_log(path, problems, progress) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                problems.add(path, number, f"is longer than {MAX_LINE_BYTES:,} bytes")
                _skip_line(file.readline)
            elif line.strip():
                yield number, line.decode("utf-8-sig", errors="replace").rstrip("\r\n")


def _skip_line(readline: Callable[[int], bytes]) -> None:
    while part := readline(MAX_LINE_BYTES):
        if part.endswith(b"\n"):
            return
