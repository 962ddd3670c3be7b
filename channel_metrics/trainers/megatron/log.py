"""Writing values where Megatron writes its own: the text log, TensorBoard, W&B."""

from __future__ import annotations

from collections.abc import Mapping

from channel_metrics.windows import Window

__all__ = ["log_line", "write"]


def log_line(title: str, values: Mapping[str, float]) -> str:
    """` iteration       10 channels | web_loss: 5.551914E+00 | web_tokens: 256 |`."""
    entries = (f" {key}: {_number(value)} |" for key, value in values.items())
    return f" {title} channels |" + "".join(entries)


def write(title: str, window: Window) -> None:
    """Print the values of a window, if it has any, and give them to the writers.

    Only the rank that has them writes. The values of an evaluation are on the disk at once:
    Megatron may end after it without closing its writer.
    """
    from megatron.training import print_rank_last
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    if not window.logs:
        return
    print_rank_last(log_line(title, window.logs))
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    if writer is not None:
        for key, value in window.logs.items():
            writer.add_scalar(key, value, window.step)
        if window.split != "train":
            writer.flush()
    if wandb_writer:
        wandb_writer.log(window.logs, window.step)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and value >= 1 else f"{value:.6E}"
