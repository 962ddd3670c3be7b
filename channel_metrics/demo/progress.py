"""What a run prints in a terminal: progress bars, and one line per log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from channel_metrics.core.keys import metric_key

__all__ = ["LineProgress", "line_of"]


def line_of(
    logs: Mapping[str, Any], step: int, channels: Sequence[str], key_format: str
) -> str | None:
    """The losses in what a trainer logs, as one line; None if it has none.

    >>> line_of({"loss": 0.5, "bbu_loss": 0.25}, 10, ["bbu", "rru"], "{channel}_{metric}")
    'step 10  loss 0.5000  bbu 0.2500'
    """
    for title, prefix in (("loss", ""), ("eval loss", "eval_")):
        if f"{prefix}loss" in logs:
            keys = {name: prefix + metric_key(key_format, name, "loss") for name in channels}
            losses = {title: f"{prefix}loss"} | keys
            parts = [f"{name} {logs[key]:.4f}" for name, key in losses.items() if key in logs]
            return "  ".join([f"step {step}", *parts])
    return None


class LineProgress(transformers.trainer_callback.ProgressCallback):
    """The trainer's progress bars, without all the keys of a log.

    channels, key_format: of the channels whose losses are shown.
    """

    def __init__(self, channels: Sequence[str], key_format: str) -> None:
        super().__init__()
        self._channels, self._key_format = channels, key_format

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line above the bar."""
        line = line_of(logs or {}, state.global_step, self._channels, self._key_format)
        if line is not None and self.training_bar is not None:
            self.training_bar.write(line)
