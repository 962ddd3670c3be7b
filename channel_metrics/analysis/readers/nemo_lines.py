"""Lines of NeMo 2: `Training epoch 0, iteration 1/3 | lr: 3e-07 | global_step: 1 | ...`."""

from __future__ import annotations

import re

from channel_metrics.analysis.readers.line_reader import (
    NUMBER,
    LineReader,
    number_of,
    records_of,
    valid_step,
)
from channel_metrics.analysis.readers.readings import Reading

__all__ = ["NemoLines"]

_HEAD = re.compile(r"\bTraining epoch \d+, iteration \d+/\d+")
_ENTRY = re.compile(rf"\s*(\S.*?):\s*({NUMBER})\s*")
_STEP, _SAMPLES, _BATCH = "global_step", "consumed_samples", "global_batch_size"


class NemoLines(LineReader):
    """The step is `global_step`: iterations begin again with each epoch.

    NeMo repeats the values of the last validation in every line; each is given once.
    """

    name = "NeMo 2"
    example = "Training epoch 0, iteration 0/3 | lr: 3e-07 | global_step: 0 |"

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def read(self, line: str) -> list[Reading] | None:
        if "Training epoch" not in line:
            return None
        found: list[Reading] = []
        is_record = False
        for _, _, entries in records_of(_HEAD, line):
            is_record = True
            values = _values(entries)
            step = _step(values)
            if step is None:
                continue
            for key, value in values.items():
                is_repeated = key.startswith("val_") and self._last.get(key) == value
                if key != _STEP and not is_repeated:
                    found.append((step, key, value))
            self._last = values
        return found if is_record else None


def _values(entries: str) -> dict[str, float]:
    values = {}
    for entry in entries.split("|"):
        match = _ENTRY.fullmatch(entry)
        value = number_of(match[2]) if match else None
        if match and value is not None:
            values[match[1]] = value
    return values


def _step(values: dict[str, float]) -> int | None:
    if _STEP in values:
        return valid_step(f"{values[_STEP]:.0f}")
    if values.get(_BATCH) and _SAMPLES in values:
        return valid_step(f"{max(values[_SAMPLES] / values[_BATCH] - 1, 0):.0f}")
    return None
