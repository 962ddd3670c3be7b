"""Lines of NeMo Automodel: `step 5 | epoch 1 | loss 1.07 | ...`, or `step=5 epoch=1 loss=1.07`."""

from __future__ import annotations

import re

from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.readers.line_reader import NUMBER, LineReader, number_of, valid_step
from channel_metrics.analysis.readers.readings import Reading

__all__ = ["AutomodelLines"]

# `[val] name "web" | step 9 | ...`, `[val] web | step 9 | ...` or `[val] step 9 | ...`.
_BARS = re.compile(
    r"(?P<val>\[val\] (?:(?:name )?\"?(?P<set>[^|\"]+)\"? \| )?)?\bstep (?P<step>\d+) +\| epoch"
    r"(?P<entries>.*)"
)
_ENTRY = re.compile(rf"\s*([\w/]+) ({NUMBER})(?:[ (].*)?")
_PAIR = re.compile(rf"(?<!\S)([\w/]+)=({NUMBER})")
# The set of a run with one validation set.
_ONLY_SET = "default"


class AutomodelLines(LineReader):
    """Values with bars between them, or pairs of key and value with a step and a loss."""

    name = "NeMo Automodel"
    example = "step 5 | epoch 1 | loss 1.07 |, step=5 loss=1.07"

    def read(self, line: str) -> list[Reading] | None:
        if "step " in line and (match := _BARS.search(line)):
            step = valid_step(match["step"])
            return [] if step is None else _with_bars(match, step)
        return _pairs(line) if "step=" in line else None


def _with_bars(match: re.Match[str], step: int) -> list[Reading]:
    found: list[Reading] = []
    # Before the first bar stands the number of the epoch.
    for entry in match["entries"].split("|")[1:]:
        of_entry = _ENTRY.fullmatch(entry.rstrip())
        value = number_of(of_entry[2]) if of_entry else None
        if of_entry and value is not None:
            found.append((step, _key(of_entry[1], match), value))
    return found


def _key(metric: str, match: re.Match[str]) -> str | Key:
    if not match["val"]:
        return metric
    name = match["set"] or _ONLY_SET
    return f"eval_{metric}" if name == _ONLY_SET else Key("eval", name, metric)


def _pairs(line: str) -> list[Reading] | None:
    texts = dict(_PAIR.findall(line))
    step = valid_step(texts.pop("step", "")) if texts.get("step", "").isdigit() else None
    if step is None or not any(key.endswith("loss") for key in texts):
        return None
    values = {key: number_of(text) for key, text in texts.items() if key != "epoch"}
    return [
        (step, "loss" if key == "train_loss" else key, value)
        for key, value in values.items()
        if value is not None
    ]
