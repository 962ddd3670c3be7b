"""Tells which starts of a job are one run, and which are separate runs.

A job that resumes goes on from a checkpoint: its first step comes later than the first step of the
part before it, and later than a new run would log for the first time. Other starts are separate
runs, unless they have other keys: then they are other values of the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from channel_metrics.analysis.readers.format import Files, Format
from channel_metrics.analysis.readers.keys import Key, is_training
from channel_metrics.analysis.readers.readings import Problems, Reading

__all__ = ["joined"]

_READINGS = 4000
# The first step of a new run is its interval, or 0 or 1.
_LATER = 1.5
# Keys that all logs of a run have.
_COMMON = ("epoch", "learning_rate", "lr", "step", "time", "timestamp")


@dataclass(frozen=True)
class _Head:
    """The begin of a log."""

    keys: frozenset[str | Key]
    steps: tuple[int, ...]
    """The first two steps of the training; fewer if there are fewer."""

    def continues(self, other: _Head) -> bool:
        """Whether this log begins in the middle of a run that `other` began."""
        if not self.steps or not other.steps or self.steps[0] <= other.steps[0]:
            return False
        own = self if len(self.steps) > 1 else other
        interval = own.steps[-1] - own.steps[0]
        return self.steps[0] > max(1.0, _LATER * interval)

    def has_other_keys(self, other: _Head) -> bool:
        """Whether it could be logged beside `other`: with other losses, if both have losses."""
        own, others = self._losses(), other._losses()
        return not (own & others if own and others else self.keys & other.keys)

    def _losses(self) -> set[str | Key]:
        return {k for k in self.keys if "loss" in (k.metric if isinstance(k, Key) else k)}


_EMPTY = _Head(frozenset(), ())


def joined(format: Format, starts: Sequence[Files]) -> list[Files]:
    """The files of each run, given those of each start, in their order."""
    if len(starts) < 2:
        return [tuple(files) for files in starts]
    heads = [(_head(format, files), files) for files in starts]
    # A job that has just begun has no values; the one before it is shown until then.
    filled = [(head, files) for head, files in heads if head != _EMPTY]
    runs: list[tuple[_Head, Files]] = []
    for head, files in filled:
        place = next(
            (
                index
                for index, (first, _) in reversed(list(enumerate(runs)))
                if head.continues(first) or head.has_other_keys(first)
            ),
            None,
        )
        if place is None:
            runs.append((head, files))
        else:
            first, before = runs[place]
            runs[place] = (_Head(first.keys | head.keys, first.steps), (*before, *files))
    return [files for _, files in runs] or [tuple(starts[-1])]


def _head(format: Format, files: Files) -> _Head:
    if format.missing:
        return _EMPTY
    readings = list(islice(_readings(format, files), _READINGS))
    steps = sorted({step for step, key, _ in readings if is_training(key)})
    keys = {key for _, key, _ in readings if key not in _COMMON}
    return _Head(frozenset(keys), tuple(steps[:2]))


def _readings(format: Format, files: Files) -> Iterator[Reading]:
    for file in files:
        yield from format.read(file, Problems(), lambda _: None)
