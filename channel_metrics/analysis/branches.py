"""Sees in the readings of a log where a job was resumed, and what that has overwritten."""

from __future__ import annotations

from typing import Any

from channel_metrics.analysis.readers.keys import Key, is_over_steps, is_training

__all__ = ["Branches"]


class Branches:
    """Sees in the readings where a job was resumed."""

    def __init__(self, in_order: bool) -> None:
        self._in_order = in_order
        self._count = self._entry_start = 0
        self._entry_step: int | None = None
        # Of each key: whether it is logged over steps, and whether by the training.
        self._is_over_steps: list[bool] = []
        self._is_training: list[bool] = []
        # {number of a key: its last step in this branch}. A key that a branch has not had yet says
        # nothing about a further one.
        self._last: dict[int, int] = {}
        self._starts: list[int] = []
        self.resumes: list[int] = []
        """The first steps after each resume."""

    def see(self, step: int, number: int, key: str | Key) -> None:
        """Note a reading. number: that of its key; a new key has the next one."""
        if step != self._entry_step:
            self._entry_step, self._entry_start = step, self._count
        self._count += 1
        last = self._last.get(number)
        if last is None:
            if number == len(self._is_training):
                self._is_over_steps.append(is_over_steps(key))
                self._is_training.append(self._in_order and is_training(key))
        elif step < last and self._is_training[number]:
            self._starts.append(self._entry_start)
            self.resumes.append(step)
            self._last = {}
        self._last[number] = step

    def limits(self, np: Any, position: int, keys: Any) -> Any:
        """The step from which on each reading is overwritten; None if none is.

        Args:
            np: numpy.
            position: the number of readings before these.
            keys: their keys.
        """
        if not self.resumes:
            return None
        # A later resume from an earlier step overwrites the branches between, too.
        after = np.append(np.minimum.accumulate(self.resumes[::-1])[::-1], np.iinfo("int64").max)
        branches = np.searchsorted(self._starts, position + np.arange(len(keys)), side="right")
        limits = after[branches]
        limits[~np.asarray(self._is_over_steps)[keys]] = np.iinfo("int64").max
        return limits
