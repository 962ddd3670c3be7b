"""A summary of the values of one log key: first, last, sum, and a curve of limited length.

>>> trace = Trace()
>>> [trace.add(step, value) for step, value in ((1, 4.0), (2, 3.0), (1, 9.0))]
[True, True, False]
>>> trace.first, trace.last, trace.curve
(4.0, 3.0, [4.0, 3.0])
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.readers.readings import Reading
from channel_metrics.analysis.store import store_of

__all__ = ["Trace", "Traces", "traces_of"]

# More than the width of any sparkline.
_MAX_BINS = 256


@dataclass
class Trace:
    """Takes values in the order of their steps. Its size does not grow with their number."""

    first: float | None = None
    """The first finite value."""

    last: float | None = None
    """The last value, which may be NaN or infinite."""

    step: int | None = None
    """The step of the last value."""

    total: float = 0.0
    """The sum of the finite values."""

    count: int = 0
    """How many values are finite."""

    _bins: list[tuple[float, int]] = field(default_factory=list)
    _bin_size: int = 1

    def add(self, step: int, value: float) -> bool:
        """Add a value. A second value for the last step replaces the first.

        Returns:
            False, without adding it, if `step` is before the last step.
        """
        if self.step is not None and step < self.step:
            return False
        if step == self.step:
            self._take_back()
        self.step, self.last = step, value
        if math.isfinite(value):
            self.first = value if self.count == 0 else self.first
            self.total += value
            self.count += 1
            self._put(value)
        return True

    @property
    def curve(self) -> list[float]:
        """At most 256 means, each of the same number of finite values, except for the last."""
        return [total / count for total, count in self._bins]

    def _put(self, value: float) -> None:
        if self._bins and self._bins[-1][1] < self._bin_size:
            total, count = self._bins[-1]
            self._bins[-1] = total + value, count + 1
            return
        if len(self._bins) == _MAX_BINS:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]
            self._bin_size *= 2
        self._bins.append((value, 1))

    def _take_back(self) -> None:
        assert self.last is not None
        if math.isfinite(self.last):
            self.total -= self.last
            self.count -= 1
            total, count = self._bins.pop()
            if count > 1:
                self._bins.append((total - self.last, count - 1))


Traces = dict["str | Key", Trace]


def traces_of(readings: Iterable[Reading], *, in_order: bool = True) -> Traces:
    """The traces of a whole log. If a step was logged twice, the last value counts."""
    store = store_of(readings, in_order=in_order)
    traces: Traces = {}
    for key in store.keys:
        trace = traces[key] = Trace()
        steps, values = store.series(key)
        for step, value in zip(steps.tolist(), values.tolist(), strict=True):
            trace.add(step, value)
    return traces
