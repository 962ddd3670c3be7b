"""The channels during a run: a table under the progress bar, or in the table of a notebook.

In a terminal, each line is a tqdm bar that shows only text, below the trainer's own bar. So the
lines share the screen with other output of tqdm. Redirected output gets no table, because the
trainer's own log lines hold every value.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from tqdm.auto import tqdm

from channel_metrics.windows import Window

__all__ = ["LiveTable", "table_lines", "wants_live_table"]

logger = logging.getLogger("channel_metrics")

ChannelValues = Mapping[str, Mapping[str, float]]

_MAX_ROWS = 12
_NOTEBOOK = "NotebookProgressCallback"


def wants_live_table(trainer: Any) -> bool:
    """Whether there is a terminal with progress bars, or a notebook."""
    in_notebook = any(
        type(callback).__name__ == _NOTEBOOK for callback in trainer.callback_handler.callbacks
    )
    return in_notebook or (sys.stderr.isatty() and not trainer.args.disable_tqdm)


def table_lines(values: ChannelValues, before: ChannelValues) -> list[str]:
    """The lines of the table: loss, its change since the window before, accuracy, share.

    The channels with the most tokens come first. The last line counts the channels left out.
    """
    ranked = sorted(values, key=lambda name: -values[name].get("share", 0.0))
    lines = [f"{'channel':<20} {'loss':>9} {'change':>9} {'acc':>7} {'share':>7}"]
    for name in ranked[:_MAX_ROWS]:
        own = values[name]
        change = _difference(own.get("loss"), before.get(name, {}).get("loss"))
        lines.append(
            f"{_fit(name, 20):<20} {_number(own.get('loss'), '9.4f')} {_number(change, '+9.4f')} "
            f"{_number(own.get('token_acc'), '7.1%')} {_number(own.get('share'), '7.1%')}"
        )
    if len(ranked) > _MAX_ROWS:
        lines.append(f"and {len(ranked) - _MAX_ROWS} more channels")
    return lines


class LiveTable(transformers.TrainerCallback):
    """Shows each train window when the trainer logs it.

    It is an observer, which gets the window, and a callback of the trainer, which draws it.

    callbacks: those of the trainer. One of them may be the table of a notebook.
    """

    is_display = True

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._callbacks = callbacks
        # The values of the window that was closed since the last log; None if there is none.
        self._closed: ChannelValues | None = None
        self._failed = False
        self._before: ChannelValues = {}
        self._bars: list[tqdm[Any]] = []

    def __call__(self, window: Window) -> None:
        """Keep a train window until the trainer logs it."""
        if window.split == "train":
            self._closed = window.values

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the window that was just closed, on the first process only."""
        window, self._closed = self._closed, None
        if not window or not state.is_world_process_zero or self._failed:
            return
        try:
            self._show(window, args, state)
        except Exception as error:  # terminals and notebooks fail in many ways
            self._failed = True
            logger.warning("the live table failed, and shows nothing from now on: %r", error)

    def _show(self, window: ChannelValues, args: Any, state: Any) -> None:
        notebook = next((c for c in self._callbacks if type(c).__name__ == _NOTEBOOK), None)
        if notebook is not None:
            # If there are evaluations, the notebook's table has one line per evaluation.
            if notebook.training_tracker is not None and args.eval_strategy == "no":
                notebook.training_tracker.write_line({"Step": state.global_step} | _columns(window))
        elif sys.stderr.isatty():
            self._draw(table_lines(window, self._before))
        self._before = {**self._before, **window}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the table from the screen."""
        for bar in self._bars:
            bar.close()
        self._bars = []

    def _draw(self, lines: list[str]) -> None:
        while len(self._bars) < len(lines):
            self._bars.append(
                tqdm(total=0, position=len(self._bars) + 1, bar_format="{desc}", leave=False)
            )
        for bar, line in zip(self._bars, lines + [""] * len(self._bars), strict=False):
            bar.set_description_str(line)


def _columns(window: ChannelValues) -> dict[str, float]:
    return {
        f"{name} {metric}": window[name][metric]
        for name in window
        for metric in ("loss", "token_acc")
        if metric in window[name]
    }


def _difference(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else now - before


def _number(value: float | None, form: str) -> str:
    width = int(form.strip("+").split(".")[0].rstrip("%"))
    return f"{'':>{width}}" if value is None else f"{value:{form}}"


def _fit(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
