"""Reads the lines that were added to a log since the last look."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from channel_metrics.analysis.readers.json_logs import read_json_line
from channel_metrics.analysis.readers.line_reader import LineReader
from channel_metrics.analysis.readers.readings import MAX_LINE_BYTES, Problems, Reading
from channel_metrics.analysis.readers.text_logs import dialect_of, parts_of, read_part

__all__ = ["LINE_FORMATS", "Tail"]

LINE_FORMATS = ("jsonl", "trainer_log", "text")

# If these bytes before our place have changed, the file was overwritten.
_MARK_BYTES = 256


class Tail:
    """A log of lines that is read on from where the last look ended."""

    def __init__(self, path: Path, format: str, problems: Problems) -> None:
        self.path = path
        self._is_text = format == "text"
        # A text whose lines have no known form yet has no reader.
        self._lines: LineReader | None = None
        self._problems = problems
        self._file: BinaryIO | None = None
        self._offset = self._number = 0
        self._mark = b""
        # Whether we are inside a line that is too long.
        self._is_inside = False

    @property
    def is_open(self) -> bool:
        """Whether the file is open."""
        return self._file is not None

    def open(self) -> None:
        """Begin at the first line of the file that is at the path now. Raises `OSError`."""
        file = self.path.open("rb")
        self.close()
        self._file = file
        self._offset = self._number = 0
        self._mark, self._is_inside, self._lines = b"", False, None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def is_older_than(self, path: Path) -> bool:
        """Whether `path` is another file than this one, and was written to later."""
        if path == self.path or self._file is None:
            return path != self.path
        return path.stat().st_mtime > os.fstat(self._file.fileno()).st_mtime

    def what_happened(self) -> Literal["", "overwritten", "replaced"]:
        """What happened to the file since the last look.

        `overwritten` is the same file with other content. `replaced` is another file at the path.
        Raises `FileNotFoundError` if there is no file.
        """
        assert self._file is not None
        own, now = os.fstat(self._file.fileno()), self.path.stat()
        if (own.st_dev, own.st_ino) != (now.st_dev, now.st_ino):
            return "replaced"
        self._file.seek(self._offset - len(self._mark))
        same = self._file.read(len(self._mark)) == self._mark
        return "" if same and own.st_size >= self._offset else "overwritten"

    def readings(self, *, to_end: bool = False) -> Iterator[Reading]:
        """The values of the new lines.

        A last line without an end is still being written. It is read only with `to_end`.
        """
        assert self._file is not None
        if self._is_text and self._lines is None:
            dialect = dialect_of(self.path)
            if dialect is None:
                return
            self._lines = dialect()
        self._file.seek(self._offset)
        while line := self._file.readline(MAX_LINE_BYTES):
            is_whole = line.endswith(b"\n")
            if not is_whole and len(line) < MAX_LINE_BYTES and not to_end:
                break
            self._offset += len(line)
            self._mark = (self._mark + line)[-_MARK_BYTES:]
            if not self._is_inside:
                self._number += 1
                yield from self._parse(line, is_whole)
            self._is_inside = not is_whole
        if to_end and self._lines is not None:
            yield from self._lines.end()

    def _parse(self, raw: bytes, is_whole: bool) -> Iterator[Reading]:
        if not is_whole and len(raw) == MAX_LINE_BYTES:
            self._problems.add(self.path, self._number, f"is longer than {len(raw):,} bytes")
            return
        line = raw.decode("utf-8-sig", errors="replace").rstrip("\r\n")
        if not line.strip():
            return
        if self._lines is None:
            yield from read_json_line(line, self.path, self._number, self._problems)
            return
        for part in parts_of(line):
            yield from read_part(self._lines, part, self.path, self._number, self._problems)
