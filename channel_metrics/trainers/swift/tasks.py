"""Which mixin is for which task of ms-swift, and which tasks go without metrics."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from swift.arguments import RLHFArguments
from swift.trainers import Seq2SeqTrainer

from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.hf import ChannelMetricsMixin

__all__ = ["RLHF_TASKS", "mixin_for", "why_without_metrics"]

RLHF_TASKS = {
    "dpo": ("DPOTrainer", "rlhf"),
    "orpo": ("ORPOTrainer", "rlhf"),
    "cpo": ("CPOTrainer", "rlhf"),
    "rm": ("RewardTrainer", "rlhf"),
    "kto": ("KTOTrainer", "rlhf"),
    "grpo": ("GRPOTrainer", "grpo"),
}
"""{rlhf_type: (the class of ms-swift's trainer, the module of its mixin)}; simpo is a cpo."""


def why_without_metrics(args: Any) -> str | None:
    """Why a run of ms-swift has no channel metrics.

    Args:
        args: the arguments of `swift sft`, `swift pt` or `swift rlhf`, or of their Megatron kind.

    Returns:
        The reason; None if the run has metrics.
    """
    rlhf_type = getattr(args, "rlhf_type", None)
    if rlhf_type is None:
        return None if args.task_type == "causal_lm" else f"this is task_type {args.task_type}"
    if not isinstance(args, RLHFArguments):
        return f"this is megatron rlhf (rlhf_type {rlhf_type})"
    if rlhf_type not in RLHF_TASKS:
        return f"this is rlhf_type {rlhf_type}"
    if args.sequence_parallel_size > 1:
        return f"rlhf_type {rlhf_type} has them only with sequence_parallel_size 1"
    if rlhf_type == "grpo" and args.multi_turn_scheduler:
        return "rlhf_type grpo has them only without multi_turn_scheduler"
    return None


def mixin_for(trainer_class: type) -> type[ChannelMetricsMixin]:
    """The mixin for a trainer of ms-swift; `UnsupportedVersionError` for other tasks."""
    name, module = "", "mixin"
    if issubclass(trainer_class, Seq2SeqTrainer):
        name = "SwiftChannelMetricsMixin"
    own = next(c for c in trainer_class.__mro__ if c.__module__.split(".")[0] == "swift")
    for trainer, where in RLHF_TASKS.values():
        if own.__name__ == trainer:
            name, module = f"Swift{trainer.removesuffix('Trainer')}Mixin", where
    if not name:
        raise UnsupportedVersionError(
            f"channel metrics are for ms-swift's Seq2SeqTrainer (swift sft, swift pt) and for "
            f"swift rlhf with {', '.join(RLHF_TASKS)}, but this is a {trainer_class.__name__}; "
            "leave the metrics out for this task."
        )
    # Imported only here: the others import TRL's parts.
    found: type[ChannelMetricsMixin] = getattr(
        import_module(f"channel_metrics.trainers.swift.{module}"), name
    )
    return found
