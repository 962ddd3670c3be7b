"""Writes values to the places that Megatron writes to: the text log, TensorBoard, W&B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from channel_metrics.windows import Window

__all__ = ["log_line", "write"]


def log_line(title: str, values: Mapping[str, float]) -> str:
    """Format values like a line of Megatron's text log.

    Args:
        title: what the line is about, such as `iteration       10`.
        values: {log key: value}.

    Returns:
        Such as ` iteration       10 channels | web_loss: 5.551914E+00 | web_tokens: 256 |`.
    """
    entries = (f" {key}: {_number(value)} |" for key, value in values.items())
    return f" {title} channels |" + "".join(entries)


def write(
    title: str, window: Window, show: Callable[[str], Any], tensorboard: Any, wandb: Any
) -> None:
    """Print the values of a window, if it has any, and give them to TensorBoard and W&B.

    Those of an evaluation are flushed to the disk, because Megatron may exit after it without
    closing the writer.

    Args:
        title: what the printed line is about.
        window: the window.
        show: prints a line on the last rank.
        tensorboard, wandb: Megatron's writers; None on ranks that have none.
    """
    if not window.logs:
        return
    worst = f" worst channel: {window.worst_channel} |" if window.worst_channel else ""
    show(log_line(title, window.logs) + worst)
    if tensorboard is not None:
        for key, value in window.logs.items():
            tensorboard.add_scalar(key, value, window.step)
        if window.split != "train":
            tensorboard.flush()
    if wandb:
        wandb.log(window.logs, window.step)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and value >= 1 else f"{value:.6E}"
