"""Lines of OLMo-core: `[step=10/1000,epoch=1,eta=17m]`, and one line for each metric below it.

An evaluation is printed in the same form below `Finished lm evals in 1.0 seconds. Metrics:`, before
its step. This step is the one that has `throughput/in-loop eval time (s)` among its metrics.
"""

from __future__ import annotations

import re

from channel_metrics.analysis.readers.line_reader import NUMBER, LineReader, number_of, valid_step
from channel_metrics.analysis.readers.readings import Reading

__all__ = ["OlmoLines"]

_HEAD = re.compile(r"\[step=(\d+)/[^,\]]*,epoch=\d+[^\]]*\]\s*$")
_EVALUATED = re.compile(r"Finished (\S+) evals in [\d.]+ seconds\. Metrics:\s*$")
_METRIC = re.compile(rf" {{4}}(\S.*?)=({NUMBER})\s*")
_OF_EVALUATION = "throughput/in-loop eval time (s)"


class OlmoLines(LineReader):
    """The metrics of a step, and those of the evaluations after it."""

    name = "OLMo-core"
    example = "[step=10/1000,epoch=1]"

    def __init__(self) -> None:
        self._step: int | None = None
        # The evaluator whose metrics are printed now, and all values that wait for their step.
        self._evaluator = ""
        self._waiting: dict[str, float] = {}

    def read(self, line: str) -> list[Reading] | None:
        is_inside = self._evaluator or self._step is not None
        metric = _METRIC.fullmatch(line) if is_inside else None
        if metric:
            value = number_of(metric[2])
            return None if value is None else self._at_metric(metric[1], value)
        head = _HEAD.search(line) if "[step=" in line else None
        self._step = valid_step(head[1]) if head else None
        evaluated = _EVALUATED.search(line) if "Finished" in line else None
        self._evaluator = evaluated[1] if evaluated else ""
        if self._evaluator:
            self._drop(f"eval/{self._evaluator}/")
        # Steps without metrics are printed, too.
        self.is_waiting = True
        return [] if head or evaluated else None

    def end(self) -> list[Reading]:
        """Evaluations whose step does not come are left out."""
        self._drop("eval/")
        return []

    def _at_metric(self, name: str, value: float) -> list[Reading]:
        if self._evaluator:
            self._waiting[f"eval/{self._evaluator}/{name}"] = value
            return []
        assert self._step is not None
        found: list[Reading] = [(self._step, name, value)]
        if name == _OF_EVALUATION:
            found += [(self._step, key, waiting) for key, waiting in self._waiting.items()]
            self._waiting = {}
        return found

    def _drop(self, prefix: str) -> None:
        late = [key for key in self._waiting if key.startswith(prefix)]
        for key in late:
            del self._waiting[key]
        if late:
            self.note = (
                "some evaluations are left out: the output does not tell their step, because "
                f"{_OF_EVALUATION!r} is not printed for it"
            )
