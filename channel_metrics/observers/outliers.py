"""Writes the sequences with the highest and the lowest loss of each channel and window.

Each rank writes those that it has counted itself, so there is no collective. Only a log point waits
for the device.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from channel_metrics.alerting import Outliers
from channel_metrics.core.extremes import Extreme
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.table import SumTable
from channel_metrics.observers.line_file import LineFile
from channel_metrics.windows import Window

__all__ = ["OutlierFiles", "Session"]


class Session(Protocol):
    """What is asked of a `ChannelMetrics`."""

    labels: LabelTable
    tokenizer: Any

    def channel_of(self, name: str | None) -> str:
        """The channel of a joint name."""

    def warn_once(self, message: str, *values: object) -> None:
        """Warn."""


class OutlierFiles:
    """The file of this rank.

    Args:
        settings: the folder, and how many sequences there are; with None, nothing is written.
        session: has the names and the tokenizer.
    """

    def __init__(self, settings: Outliers | None, session: Session) -> None:
        self._settings, self._session = settings, session
        self._file: LineFile | None = None
        self._failed = False

    def write(self, table: SumTable, window: Window) -> None:
        """Append the sequences of a window. If that fails, one warning says so.

        Args:
            table: the sums of this rank.
            window: whose split and step they have.
        """
        if self._settings is None or self._failed:
            return
        extremes = getattr(table, "extremes", None)
        if extremes is None:
            self._session.warn_once(
                "outliers are sequences of tokens, which this trainer does not count here; there "
                "are none."
            )
            return
        file = self._file or LineFile(Path(self._settings.folder) / f"rank{_rank()}.jsonl")
        self._file = file
        try:
            file.append(*self._lines(extremes.found(), self._settings.count, window))
        except OSError as error:
            self._failed = True
            self._session.warn_once(f"outliers cannot be written, and end here: {error!r}")

    def _lines(
        self, extremes: Sequence[Extreme], count: int, window: Window
    ) -> Iterator[dict[str, Any]]:
        """The most extreme ones of each channel; rows with other labels may share a channel."""
        groups: dict[str, dict[str, list[Extreme]]] = defaultdict(lambda: defaultdict(list))
        for one in extremes:
            name = self._session.labels.names[one.row - 1] if one.row else None
            groups[self._session.channel_of(name)][one.kind].append(one)
        for channel, of_channel in groups.items():
            for kind, group in of_channel.items():
                group.sort(key=lambda one: one.loss, reverse=kind == "highest")
                yield from (self._line(channel, one, window) for one in group[:count])

    def _line(self, channel: str, one: Extreme, window: Window) -> dict[str, Any]:
        line = {
            "channel_metrics": Window.version,
            "outlier": one.kind,
            "channel": channel,
            "split": window.split,
            "step": window.step,
            "loss": one.loss,
            "tokens": one.num_tokens,
            "id": one.record_id,
        }
        if self._session.tokenizer is not None and one.tokens:
            try:
                text = self._session.tokenizer.decode(list(one.tokens))
                line["text"] = text.encode(errors="replace").decode()
            except Exception as error:  # of any kind: tokenizers are not ours
                self._session.warn_once("outliers have no text, as the tokenizer failed: %r", error)
        return line


def _rank() -> int:
    """The number of this process in the whole run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))
