"""Lines of OLMo-core: `[step=10/1000,epoch=1,eta=17m]`, and one line for each metric below it."""

from __future__ import annotations

import re

from channel_metrics.analysis.readers.line_reader import NUMBER, LineReader, number_of, valid_step
from channel_metrics.analysis.readers.readings import Reading

__all__ = ["OlmoLines"]

_HEAD = re.compile(r"\[step=(\d+)/[^,\]]*,epoch=\d+[^\]]*\]\s*$")
_METRIC = re.compile(rf" {{4}}(\S.*?)=({NUMBER})\s*")


class OlmoLines(LineReader):
    """The metrics of a step. Those of an evaluation name no step, and are skipped."""

    name = "OLMo-core"
    example = "[step=10/1000,epoch=1]"

    def __init__(self) -> None:
        self._step: int | None = None

    def read(self, line: str) -> list[Reading] | None:
        metric = _METRIC.fullmatch(line) if self._step is not None else None
        if metric and self._step is not None:
            value = number_of(metric[2])
            return None if value is None else [(self._step, metric[1], value)]
        head = _HEAD.search(line) if "[step=" in line else None
        self._step = valid_step(head[1]) if head else None
        # Steps without metrics are printed, too.
        self.is_waiting = True
        return [] if head else None
