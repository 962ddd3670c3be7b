"""What a reader of printed lines is.

A file with one `LineReader` per form of lines, and `text_logs.DIALECTS` names them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from channel_metrics.analysis.readers.readings import MAX_STEP, Reading

__all__ = ["NUMBER", "LineReader", "number_of", "records_of", "valid_step"]

# A number as programs print it: 1,234 and 2.5E+00 and nan.
NUMBER = r"[+-]?(?:\d[\d,]*\.?\d*(?:[eE][+-]?\d+)?|nan|inf)"


class LineReader:
    """Reads the lines of one log, in their order."""

    name: ClassVar[str]
    """Who prints such lines."""

    example: ClassVar[str]
    """The beginning of a line."""

    note = ""
    """What users should know about the values of this log."""

    is_waiting = False
    """Whether a record has no values yet, but may get some with the next lines."""

    def read(self, line: str) -> list[Reading] | None:
        """The values that are complete with this line; None if the line is no record."""
        raise NotImplementedError

    def end(self) -> list[Reading]:
        """The values that are left after the last line."""
        return []


def records_of(head: re.Pattern[str], line: str) -> Iterator[tuple[re.Match[str], str, str]]:
    """(match of a head, text before it, text after it) of each record: a line may hold several."""
    found = list(head.finditer(line))
    ends = [match.start() for match in found[1:]] + [len(line)]
    begins = [0] + [match.end() for match in found]
    for match, begin, end in zip(found, begins, ends, strict=False):
        yield match, line[begin : match.start()], line[match.end() : end]


def number_of(text: str) -> float | None:
    """The number, if it is one; a version such as 1.2.3 is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def valid_step(text: str) -> int | None:
    """The step; None if no training has so many steps."""
    return int(text) if text.isdecimal() and len(text) < 20 and int(text) <= MAX_STEP else None
