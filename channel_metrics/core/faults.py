"""What an error in the metrics does to a run: end it, or end only the metrics.

By default an error is raised until the first train window has been summed and shown, because a
wrong set-up must be seen; after that it ends the metrics only. The first such error of a rank is
logged, and from then on that rank measures nothing. It must not fall out of step with the others,
who wait for it at the next sync: there it takes part once more, with zeros and a note that it has
stopped (see `channel_metrics.ranks.exchange`). Then all ranks know, all of them stop measuring,
and nothing is sent any more.
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

    on_error: None raises until `proven` is set, and warns from then on. error: the first error of
    this rank, None as long as there was none. off: all ranks know that one of them has stopped:
    no collectives any more. proven: a train window with tokens has been summed and shown.
    """

    def __init__(self, on_error: OnError | None = "raise") -> None:
        self.on_error = on_error
        self.error: Exception | None = None
        self.off = False
        self.proven = False

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
        """A block of our own code; where errors do not end the run, one ends the metrics."""
        try:
            yield
        except Exception as error:
            self._take(error)

    def shielded(
        self,
        original: Callable[..., Any],
        observing: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`observing(original, *args, **kwargs)`, which must call `original` and return its result.

        Where errors in `observing` do not end the run, that result is returned all the same.
        Errors of `original` are the trainer's own, and are raised.
        """
        if not self.measuring:
            return original(*args, **kwargs)
        once = Once(original)
        try:
            return observing(once, *args, **kwargs)
        except Exception as error:
            if error is once.error:
                raise
            self._take(error)
        return once.result if once.called else original(*args, **kwargs)

    def _take(self, error: Exception) -> None:
        # After a collective that failed, the ranks are out of step.
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
    """Calls a function, and remembers what came of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.called = False
        self.result: Any = None
        self.error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.result = self.function(*args, **kwargs)
        except Exception as error:
            self.error = error
            raise
        self.called = True
        return self.result
