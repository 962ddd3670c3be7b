"""Follows the log of a running job.

Logs of lines are read on from where the last look ended. Other formats cannot be read from the
middle, so they are read again as a whole when their files have changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from channel_metrics.analysis.alerts import RunAlert, alerts_of
from channel_metrics.analysis.readers.files import is_plain
from channel_metrics.analysis.readers.readings import Problems, Reading
from channel_metrics.analysis.readers.sources import Source, check_format, find_sources
from channel_metrics.analysis.watch.tail import LINE_FORMATS, Tail
from channel_metrics.analysis.watch.traces import Trace, Traces, traces_of
from channel_metrics.errors import ChannelMetricsError

__all__ = ["Follower"]

# Formats that are written only with checkpoints, or have no channels. Others are preferred.
_LAST = ("trainer_state", "trainer_log")
_SECONDS_BETWEEN_SEARCHES = 10.0
# After reading a whole log, the follower waits for this many times as long as it took.
_REST = 10.0
_LONG_AGO = float("-inf")


class Follower:
    """The contents of a log so far. The log need not exist yet.

    Args:
        run: a run folder or a log file.
        format: which log, if a folder has several. By default it is the first in the order of
            `sources`, except that the state of a trainer comes last, and empty files.
    """

    def __init__(self, run: Path, format: str | None = None) -> None:
        check_format(format)
        self.run = run
        self.format = format
        self.problems = Problems()
        self.traces: Traces = {}
        self.source: Source | None = None
        self.alerts: list[RunAlert] = []
        """What the run has told of so far."""
        self.waiting_for = ""
        """Why nothing can be read now; empty if there are values."""
        self._tail: Tail | None = None
        self._searched = self._rest_until = _LONG_AGO
        self._seen: tuple[object, ...] = ()
        self._is_behind = False

    def look(self, *, to_end: bool = False) -> bool:
        """Read what is new.

        Args:
            to_end: whether a last line without its end is read, too.

        Returns:
            Whether there was anything new.

        Raises:
            ChannelMetricsError: for errors that do not go away by waiting.
        """
        try:
            if time.monotonic() - self._searched > _SECONDS_BETWEEN_SEARCHES:
                self._search()
            if self.source is None:
                self._searched = _LONG_AGO
                return False
            changed = self._look_at_lines(self._tail, to_end) if self._tail else self._look_anew()
        except OSError as error:
            # Files of a running job come and go.
            self.waiting_for = f"{error.filename or self.run}: {error.strerror or error}"
            self._searched = _LONG_AGO
            return False
        if changed or to_end:
            self.alerts = alerts_of(self.run)
        self.waiting_for = "" if self.traces else f"{self.source.files[-1]} holds no values yet"
        return changed

    def close(self) -> None:
        """Close the file that is followed."""
        if self._tail:
            self._tail.close()

    def _search(self) -> None:
        """Choose the source again, if there is any."""
        try:
            found = find_sources(self.run)
        except ChannelMetricsError as error:
            self.waiting_for = str(error)
            return
        finally:
            self._searched = time.monotonic()
        wanted = [source for source in found if self.format in (None, source.format)]
        if not wanted:
            others = ", ".join(source.format for source in found)
            self.waiting_for = f"{self.run} has no log of format {self.format!r} yet, but {others}"
            return
        self._choose(min(wanted, key=_rank))

    def _choose(self, source: Source) -> None:
        is_same = self.source is not None and self.source.format == source.format
        if self._tail and is_same and not self._tail.is_older_than(source.files[-1]):
            return  # The same file, maybe under a new name after a rotation.
        if self._tail:
            self._tail.close()
        self.source, self._tail = source, None
        # The parts before a resume, and compressed files, can only be read as a whole.
        if source.format in LINE_FORMATS and len(source.files) == 1 and is_plain(source.files[0]):
            self._tail = Tail(source.files[-1], source.format, self.problems)

    def _look_at_lines(self, tail: Tail, to_end: bool) -> bool:
        if not tail.is_open or self._is_behind:
            if time.monotonic() < self._rest_until and tail.is_open:
                return False
            tail.open()
            return self._load(tail.readings(to_end=to_end))
        happened = tail.what_happened()
        changed = happened != "overwritten" and self._append(tail.readings())
        if happened:
            # After a rotation, the steps go on. If they go back, it is another run.
            tail.open()
            changed = self._append(tail.readings(), after=self._last_step()) or changed
        return self._look_at_lines(tail, to_end) if self._is_behind else changed

    def _append(self, readings: Iterable[Reading], after: int | None = None) -> bool:
        """Add new readings. after: their steps must be larger than this."""
        changed = False
        for step, key, value in readings:
            is_late = after is not None and step <= after
            if is_late or not self.traces.setdefault(key, Trace()).add(step, value):
                # The steps went back, after a resume or in another run: read all of it again.
                self._is_behind = True
                return changed
            changed = True
        return changed

    def _look_anew(self) -> bool:
        assert self.source is not None
        stats = [(file, os.stat(file)) for file in self.source.files]
        now = tuple((file, s.st_size, s.st_mtime_ns, s.st_ino) for file, s in stats)
        if now == self._seen or time.monotonic() < self._rest_until:
            return False
        changed = self._load(self.source.readings(self.problems, lambda _: None))
        self._seen = now
        return changed

    def _load(self, readings: Iterable[Reading]) -> bool:
        """Replace everything by a whole log; whether there is anything in it."""
        begin = time.monotonic()
        self.problems.count = 0
        self.problems.examples.clear()
        # A file that is written again is empty for a moment; the old values are kept then.
        in_order = self.source is None or self.source.in_order
        traces = traces_of(readings, in_order=in_order)
        self.traces = traces or self.traces
        self._is_behind = False
        end = time.monotonic()
        self._rest_until = end + _REST * (end - begin)
        return bool(traces)

    def _last_step(self) -> int | None:
        return max((t.step for t in self.traces.values() if t.step is not None), default=None)


def _rank(source: Source) -> tuple[bool, bool, bool]:
    """The lowest is followed. An empty file may be a leftover."""
    return bool(source.missing), not source.num_bytes, source.format in _LAST
