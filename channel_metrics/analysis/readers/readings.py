"""What readers give, and what they could not read.

A reader is a generator of readings `(step, key, value)`. The key is that of the log, or a `Key`
where the log says in so many words which channel it speaks of. A reader never holds a whole file,
and nothing in a file stops it: what it cannot use is counted in `Problems`, with the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from channel_metrics.analysis.readers.keys import Key

__all__ = ["MAX_LINE_BYTES", "MAX_STEP", "Problems", "Progress", "Reader", "Reading", "lines_of"]

Reading = tuple[int, "str | Key", float]

# Called with the number of bytes that have been read since the last call.
Progress = Callable[[int], None]

# A longer line is no log line; holding it would be what fills the memory.
MAX_LINE_BYTES = 64 * 2**20

# Exact as a float, too.
MAX_STEP = 2**53


@dataclass
class Problems:
    """Places that could not be read: how many, and the first of them in words."""

    count: int = 0
    """All of them."""

    examples: list[str] = field(default_factory=list)
    """The first ones, as `file:line: what is wrong`."""

    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers should know; not a problem."""

    max_examples: int = 20
    """How many are kept in words."""

    def add(self, where: Path | str, number: int | None, reason: str) -> None:
        """Count one; number: the line, from 1, where there are lines."""
        self.count += 1
        if len(self.examples) < self.max_examples:
            place = f"{where}:{number}" if number is not None else str(where)
            self.examples.append(f"{place}: {reason}")

    def note(self, text: str) -> None:
        """Keep a note, once."""
        if text not in self.notes:
            self.notes.append(text)


Reader = Callable[[Path, Problems, Progress], Iterator[Reading]]


def lines_of(path: Path, problems: Problems, progress: Progress) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank, of a file of any size.

    Bytes that are no UTF-8 are replaced; the reader that parses the line will complain, or not.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            progress(len(line))
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                problems.add(path, number, f"is longer than {MAX_LINE_BYTES:,} bytes")
                _skip_line(file.readline, progress)
            elif line.strip():
                yield number, line.decode("utf-8-sig", errors="replace").rstrip("\r\n")


def _skip_line(readline: Callable[[int], bytes], progress: Progress) -> None:
    while part := readline(MAX_LINE_BYTES):
        progress(len(part))
        if part.endswith(b"\n"):
            return
