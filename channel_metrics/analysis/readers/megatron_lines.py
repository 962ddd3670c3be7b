"""Lines of Megatron, with ours: ` iteration 10/ 100 | lm loss: 5.5E+00 | ...`.

A validation line names its set in one of these ways, and the set is a channel of the evaluation:

     validation-web loss at iteration 40 | lm loss value: 2.1E+00 | lm loss PPL: 8.1E+00 |
     validation loss at iteration 40 [web] | lm loss value: 2.1E+00 | ...
     extra_validation web-test loss at iteration 40 | lm loss value: 2.1E+00 | ...
"""

from __future__ import annotations

import re

from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.readers.line_reader import (
    NUMBER,
    LineReader,
    number_of,
    records_of,
    valid_step,
)
from channel_metrics.analysis.readers.readings import Reading

__all__ = ["MegatronLines"]

_HEAD = re.compile(r"\biteration:?\s+(?P<step>\d+)(?:\s*/\s*\d+)?(?P<where>[^|]*)\|")
_BEFORE = re.compile(
    r"(?:^|\s)(?:extra_validation\s+(?P<label>.+?)|(?P<split>valid(?:ation)?|test)(?:-(?P<set>.+?))?)"
    r"(?:\s+loss)?\s+at\s*$"
)
_SET = re.compile(r"\[(.+)\]")
_ENTRY = re.compile(rf"\s*(.+?):\s*({NUMBER})\s*%?\s*")
# Megatron's own validation line writes `lm loss value` and `lm loss PPL`.
_METRICS = {"lm loss value": "loss", "lm loss PPL": "ppl"}


class MegatronLines(LineReader):
    """`key: value` between bars, in every line that names an iteration."""

    name = "Megatron"
    example = "iteration 10/ 100 | lm loss: 2.3E+00 |"

    def read(self, line: str) -> list[Reading] | None:
        if "iteration" not in line:
            return None
        found: list[Reading] = []
        is_record = False
        for head, before, entries in records_of(_HEAD, line):
            is_record = True
            step = valid_step(head["step"])
            if step is not None:
                split, name = _evaluated(before, head["where"])
                for entry in entries.split("|"):
                    match = _ENTRY.fullmatch(entry)
                    value = number_of(match[2]) if match else None
                    if match and value is not None:
                        found.append((step, _key(match[1], split, name), value))
        return found if is_record else None


def _evaluated(before: str, where: str) -> tuple[str, str]:
    """(split, name of the set) of a record. Training has no split, some sets have no name."""
    match = _BEFORE.search(before)
    if match is None:
        return "", ""
    is_test = match["split"] == "test" or "test set" in where
    named = _SET.search(where)
    name = match["label"] or match["set"] or (named[1] if named else "")
    return ("test" if is_test else "eval"), name


def _key(text: str, split: str, name: str) -> str | Key:
    key = " ".join(text.split())
    if name:
        return Key(split, name, _METRICS.get(key, key.removesuffix(" value")))
    key = key.removesuffix(" value")
    # Our own lines name the split in their keys.
    return f"{split}_{key}" if split and not key.startswith(f"{split}_") else key
