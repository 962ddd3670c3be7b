"""Logs of JSON: `logging.jsonl` (ms-swift) and its like, `trainer_state.json` (transformers)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.readings import (
    MAX_LINE_BYTES,
    MAX_STEP,
    Problems,
    Progress,
    Reading,
    lines_of,
)

__all__ = [
    "first_record",
    "parse_object",
    "read_json_line",
    "read_jsonl_log",
    "read_trainer_state",
    "readings_of",
    "step_of",
]

# The first that is there is used. W&B's `_step` is last, because it counts calls, not steps.
_STEP_KEYS = (
    "step",
    "global_step/max_steps",
    "global_step",
    "iteration",
    "train/global_step",
    "steps",
    "_step",
)
_OF_TOTAL = re.compile(r"(\d+)(?:\s*/\s*\d+)?")
_LIST_START = re.compile(r'"log_history"\s*:\s*\[')
_BETWEEN = re.compile(r"[\s,]*")
_CHUNK = 1 << 20


def read_jsonl_log(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """Every number in a file with one JSON object per line, each with its step."""
    for number, line in lines_of(path, problems, progress):
        yield from read_json_line(line, path, number, problems)


def read_json_line(line: str, path: Path, number: int, problems: Problems) -> Iterator[Reading]:
    """The numbers of one line."""
    record = parse_object(line, path, number, problems)
    if record is not None:
        step = step_of(record)
        if step is None:
            problems.add(path, number, f"has no step ({', '.join(_STEP_KEYS[:4])})")
        else:
            yield from readings_of(record, step)


def read_trainer_state(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """Every number in `log_history`, entry by entry, so that a file that is cut off can be read."""
    for number, entry in enumerate(_entries(path, problems, progress), 1):
        step = step_of(entry) if isinstance(entry, dict) else None
        if step is None:
            problems.add(path, None, f"entry {number} of log_history is no object with a step")
        else:
            yield from readings_of(entry, step)


def readings_of(record: Mapping[str, Any], step: int) -> Iterator[Reading]:
    """The numbers of one log entry, without the step itself."""
    for key, value in record.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and key not in _STEP_KEYS:
            yield step, key, _as_float(value)


def step_of(record: Mapping[str, Any]) -> int | None:
    """The step of a log entry; None if it has none."""
    for key in _STEP_KEYS:
        value = record.get(key)
        if isinstance(value, str) and (match := _OF_TOTAL.fullmatch(value.strip())):
            value = float(match[1])
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        # Larger numbers and NaN are no steps, and would not fit into the store.
        if abs(value) <= MAX_STEP and value == int(value):
            return int(value)
    return None


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's integers have any length
        return math.inf if value > 0 else -math.inf


def first_record(path: Path) -> dict[str, Any] | None:
    """The first JSON object among the first lines of a file; None if there is none."""
    for number, line in lines_of(path, Problems(), lambda _: None):
        record = parse_object(line, path, number, Problems())
        if record is not None or number > 20:
            return record
    return None


def parse_object(line: str, path: Path, number: int, problems: Problems) -> dict[str, Any] | None:
    """The JSON object of a line; None, and a problem, if it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        problems.add(path, number, f"is no JSON ({error})")
        return None
    if not isinstance(value, dict):
        problems.add(path, number, f"is no JSON object, but {type(value).__name__}")
        return None
    return value


def _entries(path: Path, problems: Problems, progress: Progress) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8", errors="replace") as file:
        text, position, inside = "", 0, False
        while True:
            chunk = file.read(_CHUNK)
            progress(len(chunk))
            text, position = text[position:] + chunk, 0
            if not inside:
                start = _LIST_START.search(text)
                inside, position = start is not None, start.end() if start else 0
            while inside:
                position = _end_of_blanks(text, position)
                if text.startswith("]", position):
                    return
                try:
                    entry, position = decoder.raw_decode(text, position)
                except (ValueError, RecursionError):
                    break
                yield entry
            if not chunk or (inside and len(text) - position > MAX_LINE_BYTES):
                what = "log_history does not end: the file is cut off or damaged"
                problems.add(path, None, what if inside else "has no log_history")
                return


def _end_of_blanks(text: str, position: int) -> int:
    blanks = _BETWEEN.match(text, position)
    return blanks.end() if blanks else position
