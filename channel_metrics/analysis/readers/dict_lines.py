"""Lines that transformers and those that build on it print: `{'loss': 0.5, 'epoch': 0.02}`.

Such a line seldom names its step. If the output has the progress bar of the training, the step is
that of the next bar, because transformers draws it again after each line. Otherwise the records are
counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from channel_metrics.analysis.readers.json_logs import readings_of, step_of
from channel_metrics.analysis.readers.line_reader import LineReader, number_of
from channel_metrics.analysis.readers.readings import Reading

__all__ = ["DictLines"]

_BAR = r"(?:^|\])\W*\d{1,3}%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+)\s+\["
_DICT = r"\{(?P<entries>'[^{}]*)\}"
_BAR_OR_DICT = re.compile(f"{_BAR}|{_DICT}")
_ENTRY = re.compile(r"'((?:[^'\\]|\\.)+)': (?:'([^']*)'|([^,'\s]+))")
# Records that wait for a bar. If no bar comes, there is none in the output.
_MAX_WAITING = 1000


@dataclass
class _Record:
    values: dict[str, Any]
    bars: dict[int, int] = field(default_factory=dict)
    """{total of a bar: where it was when it was next drawn}"""

    @property
    def is_training(self) -> bool:
        return "loss" in self.values


class DictLines(LineReader):
    """Dictionaries with a loss or an epoch."""

    name = "transformers"
    example = "{'loss': 0.5, 'epoch': 0.02}"

    def __init__(self) -> None:
        self._waiting: list[_Record] = []
        self._total: int | None = None
        self._done = self._counted = 0
        self._at_number: set[str] = set()

    def read(self, line: str) -> list[Reading] | None:
        if "{'" not in line and "%|" not in line:
            return None
        found: list[Reading] = []
        is_record = False
        for match in _BAR_OR_DICT.finditer(line):
            if match["total"]:
                found += self._at_bar(int(match["done"]), int(match["total"]))
            elif (values := _values(match["entries"])) is not None:
                is_record = True
                found += self._at_record(values)
        self.is_waiting = bool(self._waiting)
        return found if is_record or found else None

    def end(self) -> list[Reading]:
        """What waits for a bar that did not come."""
        waiting, self._waiting = self._waiting, []
        return [reading for record in waiting for reading in self._count(record)]

    def _at_record(self, values: dict[str, Any]) -> list[Reading]:
        step = step_of(values)
        if step is not None:
            return list(readings_of(_numbers(values), step))
        self._waiting.append(_Record(values))
        return self.end() if len(self._waiting) > _MAX_WAITING or self._counted else []

    def _at_bar(self, done: int, total: int) -> list[Reading]:
        for record in self._waiting:
            record.bars.setdefault(total, done)
        if self._total is None and any(record.is_training for record in self._waiting):
            # Evaluations have bars of their own, but none is open when the training logs.
            self._total = total
        if total != self._total:
            return []
        self._done = done
        waiting, self._waiting = self._waiting, []
        return [
            reading
            for record in waiting
            for reading in readings_of(_numbers(record.values), record.bars[total])
        ]

    def _count(self, record: _Record) -> list[Reading]:
        if self._total is not None:
            return list(readings_of(_numbers(record.values), self._done))
        # Training records get a number each; an evaluation gets one if it would hide another.
        keys = record.values.keys() - {"epoch"}
        if record.is_training or keys & self._at_number:
            self._counted += 1
            self._at_number = set()
        self._at_number |= keys
        self.note = "the log names no steps: its records are numbered instead"
        return list(readings_of(_numbers(record.values), self._counted))


def _values(entries: str) -> dict[str, Any] | None:
    """The entries of a printed dictionary; None if it is not about a training."""
    values = {key: text or bare for key, text, bare in _ENTRY.findall(entries)}
    is_log = "epoch" in values or any(key.endswith("loss") for key in values)
    return values if is_log else None


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    numbers = {key: number_of(text) for key, text in values.items()}
    return {key: number for key, number in numbers.items() if number is not None}
