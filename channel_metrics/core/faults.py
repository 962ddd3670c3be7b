"""Decides what an error in the metrics does to a run: it ends the run, or only the metrics.

By default, an error is raised until the first train window has been summed and logged, because a
user must see that the set-up is wrong. After that, an error ends the metrics only: the rank logs
its first error and stops measuring. The other ranks wait for it at the next log point. So it takes
part in that all-reduce once more, with zeros and a mark that it has stopped (see
`channel_metrics.ranks.exchange`). Then all ranks know, all of them stop measuring, and no rank
sends anything any more.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from channel_metrics.errors import CollectiveError, StoppedError

__all__ = ["FaultGuard", "OnError", "Once"]

logger = logging.getLogger("channel_metrics")

OnError = Literal["raise", "warn"]


class FaultGuard:
    """Runs our code so that its errors do what `on_error` says.

    Args:
        on_error: "raise" ends the run, "warn" ends only the metrics. None raises until `proven`
            is set, and warns from then on.

    Attributes:
        error: the first error of this rank; None if there was none.
        off: whether all ranks know that one of them has stopped. Then there are no collectives
            any more.
        proven: whether a train window with tokens has been summed and logged.
    """

    def __init__(self, on_error: OnError | None = "raise") -> None:
        self.on_error = on_error
        self.error: Exception | None = None
        self.off = False
        self.proven = False

    def restart(self) -> None:
        """Begin a run: what an earlier run met does not count. Every rank must do so, or none."""
        self.error, self.off, self.proven = None, False, False

    @property
    def measuring(self) -> bool:
        """Whether this rank still measures."""
        return self.error is None and not self.off

    @property
    def raises(self) -> bool:
        """Whether an error ends the run now."""
        return self.on_error == "raise" or (self.on_error is None and not self.proven)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A block of our own code. An error in it ends the run if `raises`, else the metrics."""
        try:
            yield
        except Exception as error:  # of any kind: `_take` raises it, or logs it
            self._take(error)

    def shielded(
        self,
        original: Callable[..., Any],
        observing: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call `observing(original, *args, **kwargs)` so that its errors do not harm training.

        If `observing` fails and the run goes on, the result of `original` is returned. Errors of
        `original` are the trainer's own, and are always raised.

        Args:
            original: the trainer's function.
            observing: our code. It calls its first argument and returns the result.
        """
        if not self.measuring:
            return original(*args, **kwargs)
        once = Once(original)
        try:
            return observing(once, *args, **kwargs)
        except Exception as error:  # as in `guarded`
            if error is once.error:
                raise
            self._take(error)
        return once.result if once.called else original(*args, **kwargs)

    def _take(self, error: Exception) -> None:
        # If a collective has failed, the ranks are out of step: the run cannot go on.
        if self.raises or isinstance(error, CollectiveError):
            raise error
        if isinstance(error, StoppedError):
            self.off = True
            if self.error is None:
                logger.warning("channel metrics are off for the rest of this run: %s", error)
        elif self.error is None:
            place = traceback.extract_tb(error.__traceback__)[-1]
            logger.warning(
                "channel metrics are off for the rest of this run, training goes on: %s: %s "
                "(%s:%s; on_error is %s)",
                type(error).__name__,
                error,
                place.filename,
                place.lineno,
                self.on_error or "warn after the first window",
            )
        self.error = self.error or error


class Once:
    """Calls a function, and keeps its result or its error."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.called = False
        self.result: Any = None
        self.error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.result = self.function(*args, **kwargs)
        except Exception as error:  # of any kind: it is raised again
            self.error = error
            raise
        self.called = True
        return self.result
