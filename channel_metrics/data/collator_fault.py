"""An error in a collator, which may run in a worker process."""

from __future__ import annotations

import pickle
import traceback

from channel_metrics.errors import ChannelMetricsError

__all__ = ["CollatorFault"]


class CollatorFault:
    """An error of ours in a collator. It travels to the main process in place of `channels`."""

    # Not a frozen dataclass: Lightning refuses these in a batch.
    def __init__(self, error: Exception) -> None:
        self.error = error

    @classmethod
    def of(cls, error: Exception) -> CollatorFault:
        """The error itself, or its text if it cannot be pickled."""
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # a class may raise anything here; the first error is what is kept
            trace = "".join(traceback.format_exception(error))
            error = ChannelMetricsError(f"the channels of a batch could not be collated.\n{trace}")
        return cls(error)
