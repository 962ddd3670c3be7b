"""A file of JSON lines that a run appends to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["LineFile", "drop_half_line"]

_BLOCK = 4096


class LineFile:
    """Appends lines.

    path: the file; its folder is made at the first line. A half line at its end, of a run that
        was killed, is dropped then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_open = False

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Write lines, if there are any; raises `OSError` if that fails."""
        if not lines:
            return
        if not self._is_open:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_half_line(self.path)
            self._is_open = True
        text = "".join(f"{json.dumps(v, ensure_ascii=False, allow_nan=False)}\n" for v in lines)
        left = text.encode()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            while left:  # normally one write
                left = left[os.write(file, left) :]
        finally:
            os.close(file)


def drop_half_line(path: Path) -> None:
    """Cut off what a run that was killed has left behind the last whole line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep:
            start = max(0, keep - _BLOCK)
            file.seek(start)
            found = file.read(keep - start).rfind(b"\n")
            if found >= 0:
                keep = start + found + 1
                break
            keep = start
        file.truncate(keep)
