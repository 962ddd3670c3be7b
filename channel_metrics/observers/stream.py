"""Writes each closed window to a file of JSON lines, for other tools and for later.

A line holds the values under their log keys, as other JSON logs do, so `analyze`, `report` and
`watch` read it. It also holds the sums, from which any other value can be computed later.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

from channel_metrics.config import MetricsConfig
from channel_metrics.core.keys import KeyBook
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.schema import Schema, ratio
from channel_metrics.observers.line_file import LineFile
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.windows import Window

__all__ = ["Session", "WindowStream", "line_of"]


class Session(Protocol):
    """What the stream asks of a `ChannelMetrics`."""

    config: MetricsConfig
    keys: KeyBook
    ranks: Ranks
    schema: Schema


class WindowStream:
    """An observer that appends a line per window.

    Args:
        path: the file, see `LineFile`.
        session: tells what is counted, and which rank this is. The first one writes.
    """

    is_display = True

    def __init__(self, path: Path, session: Session) -> None:
        self._file, self._session = LineFile(path), session

    def __repr__(self) -> str:
        return f"the stream {self._file.path}"

    def __call__(self, window: Window) -> None:
        """Append the window."""
        if self._session.ranks.rank == 0:
            self._file.append(line_of(window, self._session))


def line_of(window: Window, session: Session) -> dict[str, Any]:
    """The line of a window, as plain values. A value that is not finite is null."""
    names = (UNLABELED, *window.names)
    values: dict[str, float] = dict(window.logs)
    whole = _whole_loss(window)
    if whole is not None:
        values.setdefault(f"{window.prefix}loss", whole)
    if not session.config.top:  # which moves channels into `others`, and their totals with them
        values = _totals(window, session.keys) | values
    return {
        "channel_metrics": Window.version,
        "step": window.step,
        "split": window.split,
        "unit": session.schema.unit,
        **({"worst_channel": window.worst_channel} if window.worst_channel else {}),
        **{key: value if math.isfinite(value) else None for key, value in values.items()},
        "columns": list(window.columns),
        "sums": {name: row for name, row in zip(names, window.table, strict=True) if any(row)},
    }


def _totals(window: Window, keys: KeyBook) -> dict[str, float]:
    """The counts of the whole run, of the channels in the window.

    A checkpoint in the middle of a window keeps what was counted, but no line ever has it if the
    run goes on from there.
    """
    if window.split != "train":
        return {}
    counted = zip((UNLABELED, *window.names[: window.num_channels]), window.table, strict=False)
    found = {
        keys.key(name, metric): count
        for name, row in counted
        if any(row)
        for metric, count in window.totals.get(name, {}).items()
        if count
    }
    return {key: count for key, count in found.items() if key not in keys.clashes}


def _whole_loss(window: Window) -> float | None:
    """nll / tokens of all channels, also of those that are not logged.

    NaN if none of the tokens has a finite loss; None if there are no tokens.
    """
    if not {"nll", "tokens", "nonfinite"} <= {*window.columns}:
        return None
    added = map(sum, zip(*window.table[: window.num_channels + 1], strict=True))
    sums = dict(zip(window.columns, added, strict=True))
    if sums["tokens"] and sums["tokens"] == sums["nonfinite"]:
        return math.nan
    return ratio(sums["nll"], sums["tokens"] - sums["nonfinite"])
