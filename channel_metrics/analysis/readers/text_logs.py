"""Reads text logs of Megatron, with our lines: ` iteration 10/ 100 | lm loss: 5.5E+00 | ...`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from channel_metrics.analysis.readers.readings import (
    MAX_STEP,
    Problems,
    Progress,
    Reading,
    lines_of,
)

__all__ = ["is_metric_line", "read_text_line", "read_text_log"]

_HEAD = re.compile(r"\b(validation\b.*?)?\biteration:?\s+(\d+)(?:\s*/\s*\d+)?([^|]*)\|(.*)")
_ENTRY = re.compile(r"\s*(.+?):\s*([+-]?(?:\d[\d.,]*(?:[eE][+-]?\d+)?|nan|inf))\s*%?\s*")
# Megatron's own validation line writes `lm loss value`, without `eval_`.
_VALUE_KEY = re.compile(r"\s+value$")


def is_metric_line(line: str) -> bool:
    """Whether `line` is one that `read_text_log` reads."""
    return _HEAD.search(line) is not None


def read_text_log(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """`key: value` between bars, in every line that names an iteration; other lines are skipped."""
    for number, line in lines_of(path, problems, progress):
        yield from read_text_line(line, path, number, problems)


def read_text_line(line: str, path: Path, number: int, problems: Problems) -> list[Reading]:
    """The values of one line. It is a problem if it names an iteration and has no value."""
    found = _values(line)
    if found == []:
        problems.add(path, number, "names an iteration, but holds no `key: value`")
    return found or []


def _values(line: str) -> list[Reading] | None:
    """The values of a line; None if it names no iteration."""
    head = _HEAD.search(line)
    if head is None:
        return None
    validation, step, _, entries = head.groups()
    if float(step) > MAX_STEP:
        return []
    matches = (_ENTRY.fullmatch(entry) for entry in entries.split("|"))
    return [
        (int(step), _name(match[1], bool(validation)), number)
        for match in matches
        if match and (number := _number(match[2])) is not None
    ]


def _name(key: str, is_validation: bool) -> str:
    name = _VALUE_KEY.sub("", " ".join(key.split()))
    if is_validation and not name.startswith("eval_"):
        return f"eval_{name}"
    return name


def _number(text: str) -> float | None:
    """The number, if it is one; a version such as 1.2.3 is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
