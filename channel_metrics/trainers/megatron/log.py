"""Writing values where Megatron writes its own: the text log, TensorBoard, W&B."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["log_line", "write"]


def log_line(title: str, values: Mapping[str, float]) -> str:
    """` iteration       10 channels | web_loss: 5.551914E+00 | web_tokens: 256 |`."""
    entries = (f" {key}: {_number(value)} |" for key, value in values.items())
    return f" {title} channels |" + "".join(entries)


def write(title: str, values: Mapping[str, float], iteration: int, prefix: str = "") -> None:
    """Print `values` and give them to the writers; only the rank that has them writes.

    prefix: goes before every key, e.g. `eval_`. With one, the values are on the disk at once:
    Megatron may end after an evaluation without closing its writer.
    """
    from megatron.training import print_rank_last
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    named = {f"{prefix}{key}": value for key, value in values.items()}
    print_rank_last(log_line(title, named))
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    if writer is not None:
        for key, value in named.items():
            writer.add_scalar(key, value, iteration)
        if prefix:
            writer.flush()
    if wandb_writer and named:
        wandb_writer.log(named, iteration)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and value >= 1 else f"{value:.6E}"
