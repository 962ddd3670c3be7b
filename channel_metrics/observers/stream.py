"""Writes each closed window to a file of JSON lines, for other tools and for later.

A line holds the values under their log keys, as other JSON logs do, so `analyze`, `report` and
`watch` read it. It also holds the sums, from which any other value can be computed later.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.schema import Schema, ratio
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.windows import Window

__all__ = ["Session", "WindowStream", "drop_half_line", "line_of"]

_BLOCK = 4096


class Session(Protocol):
    """What the stream asks of a `ChannelMetrics`."""

    ranks: Ranks
    schema: Schema


class WindowStream:
    """An observer that appends a line per window.

    Args:
        path: the file; its folder is made. A half line at its end, of a run that was killed, is
            dropped.
        session: tells what is counted, and which rank this is. The first one writes.
    """

    is_display = True

    def __init__(self, path: Path, session: Session) -> None:
        self.path, self._session = path, session
        self._is_open = False

    def __repr__(self) -> str:
        return f"the stream {self.path}"

    def __call__(self, window: Window) -> None:
        """Append the window."""
        if self._session.ranks.rank != 0:
            return
        if not self._is_open:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_half_line(self.path)
            self._is_open = True
        line = json.dumps(
            line_of(window, self._session.schema.unit), ensure_ascii=False, allow_nan=False
        )
        # One write, so no reader sees half a line.
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, f"{line}\n".encode())
        finally:
            os.close(file)


def line_of(window: Window, unit: str) -> dict[str, Any]:
    """The line of a window, as plain values. A value that is not finite is null."""
    names = (UNLABELED, *window.names)
    values: dict[str, float] = dict(window.logs)
    whole = _whole_loss(window)
    if whole is not None:
        values.setdefault(f"{window.prefix}loss", whole)
    return {
        "channel_metrics": Window.version,
        "step": window.step,
        "split": window.split,
        "unit": unit,
        **{key: value if math.isfinite(value) else None for key, value in values.items()},
        "columns": list(window.columns),
        "sums": {name: row for name, row in zip(names, window.table, strict=True) if any(row)},
    }


def _whole_loss(window: Window) -> float | None:
    """nll / tokens of all channels, also of those that are not logged."""
    if not {"nll", "tokens", "nonfinite"} <= {*window.columns}:
        return None
    added = map(sum, zip(*window.table[: window.num_channels + 1], strict=True))
    sums = dict(zip(window.columns, added, strict=True))
    return ratio(sums["nll"], sums["tokens"] - sums["nonfinite"])


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
