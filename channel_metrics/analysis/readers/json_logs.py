"""Logs of JSON lines: `logging.jsonl` of ms-swift, `trainer_log.jsonl` of LLaMA-Factory, others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.format import MAX_FILES, Files, Folder, Format, in_folder
from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.readers.lines import lines_of
from channel_metrics.analysis.readers.readings import (
    MAX_STEP,
    Problems,
    Progress,
    Reading,
)

__all__ = [
    "JSONL",
    "STEP_KEYS",
    "TRAINER_LOG",
    "end_of_blanks",
    "first_with_step",
    "parse_object",
    "read_json_line",
    "read_jsonl_log",
    "readings_of",
    "step_of",
]

# The first that is there is used. W&B's `_step` is last, because it counts calls, not steps.
STEP_KEYS = (
    "step",
    "global_step/max_steps",
    "global_step",
    "iteration",
    "train/global_step",
    "steps",
    "current_steps",
    "Step",
    "_step",
)
# The end of the training, which some logs repeat in every entry.
_ENDS = ("total_steps", "max_steps")
_OF_TOTAL = re.compile(r"(\d+)(?:\s*/\s*\d+)?")
_LINES_TO_LOOK_AT = 200
# NeMo Automodel writes `validation.jsonl`, or one such file for each of several sets.
_VALIDATION = re.compile(r"validation(?:_(?P<set>[^.]+))?\.jsonl")
_BETWEEN = re.compile(r"[\s,]*")
# JSON has no such numbers, so some programs write texts.
_NO_JSON = ("NaN", "Infinity", "-Infinity")
# Each line of our own stream has this key. Only there, null always stands for a number.
_OURS = "channel_metrics"


def read_jsonl_log(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """Every number in a file with one JSON object per line, each with its step."""
    evaluated = _VALIDATION.match(path.name)
    for number, line in lines_of(path, problems, progress):
        for step, key, value in read_json_line(line, path, number, problems):
            yield step, _evaluated(str(key), evaluated["set"]) if evaluated else key, value


def _evaluated(key: str, name: str | None) -> str | Key:
    """The key of a file that only has evaluations, of a set with this name."""
    metric = key.removeprefix("eval_").removeprefix("val_")
    return Key("eval", name, metric) if name else f"eval_{metric}"


def read_json_line(line: str, path: Path, number: int, problems: Problems) -> Iterator[Reading]:
    """The numbers of one line."""
    for record in _objects(line, path, number, problems):
        step = step_of(record)
        if step is None:
            problems.add(path, number, f"has no step ({', '.join(STEP_KEYS[:4])})")
        else:
            yield from readings_of(record, step, problems)


def readings_of(
    record: Mapping[str, Any], step: int, problems: Problems | None = None
) -> Iterator[Reading]:
    """The numbers of one log entry, without the step itself. problems: counts losses of null."""
    for key, value in record.items():
        if key in STEP_KEYS or key in _ENDS:
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield step, key, _as_float(value)
        elif isinstance(value, str) and value in _NO_JSON:
            yield step, key, float(value)
        elif value is None and _OURS in record:
            yield step, key, math.nan
        elif value is None and problems and str(key).endswith("loss"):
            problems.null_losses += 1


def step_of(record: Mapping[str, Any]) -> int | None:
    """The step of a log entry; None if it has none."""
    for key in STEP_KEYS:
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


def first_with_step(path: Path) -> dict[str, Any] | None:
    """The first JSON object with a step among the first lines of a file; None if there is none."""
    for number, line in lines_of(path, Problems(), lambda _: None):
        for record in _objects(line, path, number, Problems()):
            if step_of(record) is not None:
                return record
        if number > _LINES_TO_LOOK_AT:
            return None
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


def _objects(line: str, path: Path, number: int, problems: Problems) -> Iterator[dict[str, Any]]:
    """The objects of a line. Two processes may have written into one line."""
    position, decoder = end_of_blanks(line, 0), json.JSONDecoder()
    while position < len(line):
        try:
            value, position = decoder.raw_decode(line, position)
        except (ValueError, RecursionError) as error:
            problems.add(path, number, f"is no JSON ({error})")
            return
        if isinstance(value, dict):
            yield value
        else:
            problems.add(path, number, f"is no JSON object, but {type(value).__name__}")
        position = end_of_blanks(line, position)


def end_of_blanks(text: str, position: int) -> int:
    """The place of the next character that is no blank and no comma."""
    blanks = _BETWEEN.match(text, position)
    return blanks.end() if blanks else position


def _lacks_step(path: Path) -> str:
    if first_with_step(path) is not None:
        return ""
    begin = next((line for _, line in lines_of(path, Problems(), lambda _: None)), "")
    if not begin.lstrip().startswith("{"):
        return "its first line is no JSON object"
    return f"it is JSONL, but no line has one of: {', '.join(STEP_KEYS)}"


def _jsonl(folder: Folder) -> list[Files]:
    """Our stream, or `logging.jsonl`, else other JSONL. ms-swift makes a new folder per start."""
    named = folder.named(_STREAM, depth=2) or folder.named("logging.jsonl", depth=2)
    own: list[Files] = [(path,) for path in named if path.parent == folder.root]
    found = folder.named("*.jsonl", depth=1, limit=MAX_FILES)
    others = (path for path in found if not path.name.startswith(f"{_TRAINER_LOG}."))
    return own or [(path,) for path in named] or [(p,) for p in others if _is_log(p)]


def _is_log(path: Path) -> bool:
    # A log of samples is another format, whose module needs this one.
    from channel_metrics.analysis.readers.samples import is_no_log, is_sample_record

    record = first_with_step(path)
    return record is not None and not is_sample_record(record) and not is_no_log(record)


_TRAINER_LOG = "trainer_log"
# What docs/stream.md calls the file of our own stream.
_STREAM = "windows.jsonl"

JSONL = Format(
    name="jsonl",
    what="JSON lines with a step",
    read=read_jsonl_log,
    check=_lacks_step,
    suffixes=(".jsonl", ".json", ".log", ".txt", ".ndjson"),
    starts=_jsonl,
)
TRAINER_LOG = Format(
    name="trainer_log",
    what="trainer_log.jsonl of LLaMA-Factory",
    read=read_jsonl_log,
    check=_lacks_step,
    names=("trainer_log.jsonl",),
    starts=in_folder("trainer_log.jsonl", check=_lacks_step, depth=1),
)
