"""Gives each `MegatronTrainer` of ms-swift that is made from now on channel metrics.

`channel_metrics.trainers.swift.patch` applies and reverts it. It is a module of its own because it
imports the Megatron side of ms-swift, which most runs do not have.
"""

from __future__ import annotations

from typing import Any

from swift.megatron.trainers.trainer import MegatronTrainer

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard
from channel_metrics.trainers.swift.patch import KEY
from channel_metrics.trainers.swift_megatron.attaching import attach, check_megatron_trainer

__all__ = ["apply", "is_applied"]


def apply(config: MetricsConfig) -> None:
    """Patch `MegatronTrainer.__init__`; a second call does nothing.

    Raises:
        UnsupportedVersionError: for an ms-swift that we do not know. Nothing is patched then.
    """
    if is_applied():
        return
    check_megatron_trainer(MegatronTrainer)

    def init_with_metrics(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        # Of other tasks, `channel_metrics.trainers.swift.patch` has said so.
        if trainer.args.task_type == "causal_lm":
            with FaultGuard(config.on_error).guarded():
                attach(trainer, config)

    swap.wrap(MegatronTrainer, "__init__", init_with_metrics, key=KEY)


def is_applied() -> bool:
    """Whether `MegatronTrainer.__init__` is patched now."""
    return swap.is_wrapped(MegatronTrainer, "__init__", key=KEY)
