"""Reads text logs: what a program printed, in one of the forms of `DIALECTS`.

A log may begin with any number of other lines. A file is read in one form only: that of most of its
first records.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from channel_metrics.analysis.readers.automodel_lines import AutomodelLines
from channel_metrics.analysis.readers.dict_lines import DictLines
from channel_metrics.analysis.readers.format import MAX_FILES, Files, Folder, Format
from channel_metrics.analysis.readers.line_reader import LineReader
from channel_metrics.analysis.readers.lines import lines_of
from channel_metrics.analysis.readers.megatron_lines import MegatronLines
from channel_metrics.analysis.readers.nemo_lines import NemoLines
from channel_metrics.analysis.readers.olmo_lines import OlmoLines
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.analysis.readers.torchtitan_lines import TorchtitanLines

__all__ = ["DIALECTS", "TEXT", "dialect_of", "parts_of", "read_part", "read_text_log"]

# If two read the same lines, the first one is taken: a line of NeMo looks like one of Megatron.
DIALECTS: tuple[type[LineReader], ...] = (
    NemoLines,
    MegatronLines,
    DictLines,
    TorchtitanLines,
    OlmoLines,
    AutomodelLines,
)

# Colours, and movements of the cursor.
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_RECORDS = 50
# Of a folder, at most so many bytes are searched for lines in a known form.
_MAX_BYTES = 64 * 2**20


def dialect_of(path: Path, max_bytes: float = float("inf")) -> type[LineReader] | None:
    """The form of the lines of a file, of which at most `max_bytes` are read; None if unknown."""
    facts = path.stat()
    return _dialect_of(path, facts.st_size, facts.st_mtime_ns, max_bytes)


@lru_cache(maxsize=4 * MAX_FILES)
def _dialect_of(path: Path, size: int, mtime: int, max_bytes: float) -> type[LineReader] | None:
    readers = [dialect() for dialect in DIALECTS]
    found: Counter[int] = Counter()
    read = 0

    def count(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes

    for _, line in lines_of(path, Problems(), count):
        for part in parts_of(line):
            found.update(i for i, reader in enumerate(readers) if reader.read(part) is not None)
        if found.total() >= _RECORDS or read > max_bytes:
            break
    # `max` takes the first of those that are equal.
    return DIALECTS[max(range(len(readers)), key=found.__getitem__)] if found else None


def parts_of(line: str) -> list[str]:
    """The line without colours, cut where a progress bar went back to its start."""
    plain = _ANSI.sub("", line) if "\x1b" in line else line
    return plain.split("\r") if "\r" in plain else [plain]


def read_text_log(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """The values of every line that is a record; other lines are skipped."""
    dialect = dialect_of(path)
    if dialect is None:
        problems.add(path, None, f"no line is in a known form: {_forms()}")
        return
    reader = dialect()
    for number, line in lines_of(path, problems, progress):
        for part in parts_of(line):
            yield from read_part(reader, part, path, number, problems)
    yield from reader.end()
    if reader.note:
        problems.note(reader.note)


def read_part(
    reader: LineReader, part: str, path: Path, number: int, problems: Problems
) -> list[Reading]:
    """The values of a line. It is a problem if it looks like a record and has no value."""
    found = reader.read(part)
    if found is not None and not found and not reader.is_waiting:
        problems.add(path, number, f"looks like a line of {reader.name}, but holds no value")
    return found or []


def _check(path: Path) -> str:
    return "" if dialect_of(path) else f"no line is in a known form: {_forms()}"


def _forms() -> str:
    return ", ".join(f"{dialect.name} ({dialect.example})" for dialect in DIALECTS)


def _starts(folder: Folder) -> list[Files]:
    found = folder.named("*.log", "*.txt", "*.out", "*.err", depth=1, limit=MAX_FILES)
    # W&B keeps what a run has printed.
    found += [path for path in folder.named("output.log") if path.parent.name == "files"]
    starts: list[Files] = []
    left = _MAX_BYTES
    for path in found:
        if left > 0 and dialect_of(path, left):
            starts.append((path,))
        left -= path.stat().st_size
    return starts


TEXT = Format(
    name="text",
    what="printed lines of a trainer",
    read=read_text_log,
    check=_check,
    suffixes=(".log", ".txt", ".out", ".err"),
    starts=_starts,
)
