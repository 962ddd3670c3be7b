"""Says on stderr what a command is doing, if that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar", "phase"]

_UPDATES = 1000


@contextmanager
def phase(text: str) -> Iterator[None]:
    """A line for work whose end is not known."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def bar(
    text: str, total: int | None = None
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar; gives (advance, expect), which take a number of steps done, and the whole number."""
    if not sys.stderr.isatty():
        yield (lambda _: None), (lambda _: None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(text), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(text, total=total)
        whole, done, waiting = total or 0, 0, 0

        def expect(number: int) -> None:
            nonlocal whole, done, waiting
            whole, done, waiting = number, 0, 0
            shown.update(task, total=number, completed=0)

        def advance(number: int) -> None:
            nonlocal done, waiting
            done, waiting = done + number, waiting + number
            # An update for each line would take longer than reading it.
            if waiting * _UPDATES >= whole:
                shown.update(task, completed=done)
                waiting = 0

        yield advance, expect
