"""What the library says, where pytest's `caplog` is not: on ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["warnings_of_ours"]


class _Keeping(logging.Handler):
    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    """The messages that the logger of channel_metrics is given in this block."""
    found: list[str] = []
    handler = _Keeping(found)
    logger = logging.getLogger("channel_metrics")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
