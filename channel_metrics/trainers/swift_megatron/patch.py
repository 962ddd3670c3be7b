"""Gives each `MegatronTrainer` of ms-swift that is made from now on channel metrics.

For the patch `ms_swift`. ms-swift imports its Megatron side only in runs that use it, and so does
this: nothing of it is imported here.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard

__all__ = ["patch_megatron_trainer", "unpatch_megatron_trainer"]

logger = logging.getLogger("channel_metrics")

_MODULE = "swift.megatron.trainers.trainer"
_MARK = "_channel_metrics_original"


def patch_megatron_trainer(config: MetricsConfig) -> bool:
    """Patch it if it is imported already, and not patched; whether it is patched now."""
    trainer_class = _trainer_class()
    if trainer_class is None:
        return False
    original = trainer_class.__init__
    if hasattr(original, _MARK):
        return True
    from channel_metrics.trainers.swift_megatron import attach, check_megatron_trainer

    check_megatron_trainer(trainer_class)

    @functools.wraps(original)
    def init_with_metrics(trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        task = trainer.args.task_type
        if task != "causal_lm":
            logger.warning(
                "no channel metrics: task_type is %s, whose loss is not one of tokens.", task
            )
            return
        with FaultGuard(config.on_error).guarded():
            attach(trainer, config)

    setattr(init_with_metrics, _MARK, original)
    trainer_class.__init__ = init_with_metrics
    return True


def unpatch_megatron_trainer() -> None:
    """Put the original back; trainers made before keep their metrics."""
    trainer_class = _trainer_class()
    original = getattr(getattr(trainer_class, "__init__", None), _MARK, None)
    if original is not None:
        trainer_class.__init__ = original


def _trainer_class() -> Any:
    return getattr(sys.modules.get(_MODULE), "MegatronTrainer", None)
