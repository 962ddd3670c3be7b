"""Reads `trainer_state.json` of transformers, which each checkpoint has."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.files import open_log
from channel_metrics.analysis.readers.format import Files, Folder, Format
from channel_metrics.analysis.readers.json_logs import end_of_blanks, readings_of, step_of
from channel_metrics.analysis.readers.readings import MAX_LINE_BYTES, Problems, Progress, Reading

__all__ = ["TRAINER_STATE", "read_trainer_state"]

_LIST_START = re.compile(r'"log_history"\s*:\s*\[')
_CHUNK = 1 << 20


def read_trainer_state(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """Every number in `log_history`, entry by entry, so that a file that is cut off can be read."""
    for number, entry in enumerate(_entries(path, problems, progress), 1):
        step = step_of(entry) if isinstance(entry, dict) else None
        if step is None:
            problems.add(path, None, f"entry {number} of log_history is no object with a step")
        else:
            yield from readings_of(entry, step, problems)


def _entries(path: Path, problems: Problems, progress: Progress) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
    with open_log(path, problems, progress) as file:
        text, position, inside = "", 0, False
        while True:
            chunk = file.read(_CHUNK)
            text, position = text[position:] + decode(chunk, not chunk), 0
            if not inside:
                start = _LIST_START.search(text)
                inside, position = start is not None, start.end() if start else 0
            while inside:
                position = end_of_blanks(text, position)
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


def _lacks_history(path: Path) -> str:
    with open_log(path, Problems(), lambda _: None) as file:
        text = ""
        while chunk := file.read(_CHUNK):
            text = text[-100:] + chunk.decode("utf-8", "replace")
            if _LIST_START.search(text):
                return ""
    return "it is JSON, but has no log_history"


def _trainer_state(folder: Folder) -> list[Files]:
    found = folder.named("trainer_state.json", depth=2)
    own = [path for path in found if path.parent == folder.root]
    checkpoints = [path for path in found if path.parent.name.startswith("checkpoint-")]
    return [(path,) for path in (own or checkpoints[-1:])]


TRAINER_STATE = Format(
    name="trainer_state",
    what="trainer_state.json of transformers",
    read=read_trainer_state,
    check=_lacks_history,
    suffixes=(".json",),
    starts=_trainer_state,
)
