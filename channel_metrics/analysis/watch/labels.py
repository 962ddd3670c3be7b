"""Finds out which names in a growing log are labels of axes."""

from __future__ import annotations

from collections.abc import Sequence

from channel_metrics.analysis.axes import axis_of
from channel_metrics.analysis.readers.keys import decode_keys
from channel_metrics.analysis.run import load_run
from channel_metrics.analysis.watch.follow import Follower
from channel_metrics.core.labels import UNLABELED
from channel_metrics.errors import ChannelMetricsError

__all__ = ["LabelFinder"]


class LabelFinder:
    """Reads the log as a whole when it has new names with a "/", or twice as many steps."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._axes: list[str] = []
        self._num_keys = 0
        self._step = 0

    def axes(self, channels: Sequence[str]) -> list[str]:
        """The axes that the log has labels of. channels: names that are channels."""
        traces, source = self._follower.traces, self._follower.source
        step = max((t.step for t in traces.values() if t.step is not None), default=0)
        if len(traces) == self._num_keys and step < 2 * self._step:
            return self._axes
        meanings = decode_keys(traces, [*channels, UNLABELED] if channels else ())
        if source is None or not any(axis_of(means.channel) for means in meanings.values()):
            self._axes = []
        else:
            try:
                run = load_run(self._follower.run, format=source.format, channels=channels)
            except (ChannelMetricsError, OSError):
                return self._axes  # Files of a running job come and go.
            self._axes = run.axes
        self._num_keys, self._step = len(traces), step
        return self._axes
