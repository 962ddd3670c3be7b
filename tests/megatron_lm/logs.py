"""What Megatron prints and writes, as numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_STAMP = re.compile(r"^\s*(\[[^\]]*\])?\s*")
_ITERATION = re.compile(r"iteration\s+(\d+)")


@dataclass(frozen=True)
class Line:
    """`HEAD | name: number | name: number |`"""

    head: str
    """What stands before the first bar, without the time: `iteration        1/       6`."""

    iteration: int
    values: dict[str, float]


def parse_lines(text: str) -> list[Line]:
    """The lines of a log that name an iteration before their first bar."""
    lines = []
    for line in text.splitlines():
        head, *fields = _STAMP.sub("", line).split("|")
        named = _ITERATION.search(head)
        if named and fields:
            lines.append(Line(head.strip(), int(named[1]), parse_fields(fields)))
    return lines


def parse_fields(fields: list[str]) -> dict[str, float]:
    values = {}
    for field in fields:
        name, colon, value = field.rpartition(":")
        try:
            values[name.strip()] = float(value)
        except ValueError:
            assert not colon or not value.strip() or not value.strip()[0].isdigit(), field
    return values


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag, then step, to value: all event files of a folder of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
