"""Lines of torchtitan: `step: 10  loss: 10.5298  grad_norm:  1.5870  memory: 47.71GiB(34.12%)`."""

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

__all__ = ["TorchtitanLines"]

_HEAD = re.compile(r"(?P<validate>\bvalidate )?\bstep:\s*(?P<step>\d+)\s\s+(?=loss:)")
_ENTRY = re.compile(rf"(\w+):\s*({NUMBER})")


class TorchtitanLines(LineReader):
    """Of a validation, only its loss is read."""

    name = "torchtitan"
    example = "step: 10  loss: 10.5298  grad_norm: 1.5870"

    def read(self, line: str) -> list[Reading] | None:
        if "step:" not in line:
            return None
        found: list[Reading] = []
        is_record = False
        for head, _, entries in records_of(_HEAD, line):
            is_record = True
            step = valid_step(head["step"])
            for key, text in _ENTRY.findall(entries):
                value = number_of(text)
                if step is None or value is None or (head["validate"] and key != "loss"):
                    continue
                found.append((step, "eval_loss" if head["validate"] else key, value))
        return found if is_record else None
