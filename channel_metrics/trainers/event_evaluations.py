"""Evaluations whose begin and end are events of a trainer, so that no block can be around them."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from channel_metrics.session import ChannelMetrics
from channel_metrics.windows import Window

__all__ = ["EventEvaluations"]


class EventEvaluations:
    """The windows of an evaluation, one data set after the other.

    An evaluation that is open when the next one begins has failed, or its trainer has no event for
    its end. It is dropped.

    Args:
        session: counts into the windows.
    """

    def __init__(self, session: ChannelMetrics) -> None:
        self._session = session
        self._windows: list[Window] = []
        # None while nothing is open: trainers copy and pickle what they hold.
        self._sets: Generator[int] | None = None
        self._number = -1

    def begin(self, splits: Sequence[str], step: int) -> None:
        """Begin an evaluation, before the first batch of its first set.

        Args:
            splits: the name of each set, in order; its log keys begin with it.
            step: the optimizer step.
        """
        self.drop()
        self._sets, self._number = self._in_turn(splits, step), -1
        self.reach(0)

    def reach(self, number: int) -> None:
        """Count for the set of this number, and end the windows of those before it."""
        while self._sets is not None and self._number < number:
            self._number = next(self._sets, number)

    def end(self) -> list[Window]:
        """End the evaluation, if one is open. A collective.

        Returns:
            The windows of its sets. All ranks close them in one order, also without a batch.
        """
        for _ in self._sets or ():
            pass
        windows = self._windows
        self.drop()
        return windows

    def drop(self) -> None:
        """Forget the evaluation that is open, if there is one, without a collective."""
        if self._sets is not None:
            self._sets.close()
        self._sets, self._windows = None, []

    def _in_turn(self, splits: Sequence[str], step: int) -> Generator[int]:
        for number, split in enumerate(splits):
            with self._session.evaluation(split, step, prefix=f"{split}_") as found:
                yield number
            assert found.window is not None  # it was not discarded
            self._windows.append(found.window)
