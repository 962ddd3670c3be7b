"""The readings of a log, and the problems with it.

A reader is a generator of readings `(step, key, value)`. The key is that of the log, or a `Key` if
the log names the channel. A reader never holds a whole file. It raises no error for the content of
a file: it counts what it cannot read in `Problems`, with the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from channel_metrics.analysis.readers.keys import Key

__all__ = [
    "MAX_EXAMPLES",
    "MAX_LINE_BYTES",
    "MAX_STEP",
    "Problems",
    "Progress",
    "Reader",
    "Reading",
]

Reading = tuple[int, "str | Key", float]

# Called with the number of bytes that have been read since the last call.
Progress = Callable[[int], None]

# How many problems are kept in words.
MAX_EXAMPLES = 20

# A longer line is no log line, and is not held in memory.
MAX_LINE_BYTES = 64 * 2**20

# The largest step; float64 is exact up to here.
MAX_STEP = 2**53


@dataclass
class Problems:
    """Places that could not be read, and notes."""

    count: int = 0
    """The number of places."""

    examples: list[str] = field(default_factory=list)
    """The first places, as `file:line: what is wrong`."""

    notes: list[str] = field(default_factory=list)
    """What users should know about the numbers; not a problem."""

    null_losses: int = 0
    """Losses that are null in JSON. This may stand for NaN, or for no value."""

    def add(self, where: Path | str, number: int | None, reason: str) -> None:
        """Count one place. number: the line, from 1, if there are lines."""
        self.count += 1
        if len(self.examples) < MAX_EXAMPLES:
            place = f"{where}:{number}" if number is not None else str(where)
            self.examples.append(f"{place}: {reason}")

    def note(self, text: str) -> None:
        """Keep a note, once."""
        if text not in self.notes:
            self.notes.append(text)


Reader = Callable[[Path, Problems, Progress], Iterator[Reading]]
