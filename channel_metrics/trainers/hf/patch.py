"""Gives channel metrics to each transformers Trainer that is made after `apply`.

Only `Trainer.__init__` is patched. In the end, it calls `attach(self, config)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard
from channel_metrics.trainers.hf.attaching import attach, detach
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin, check_trainer
from channel_metrics.trainers.patching import announce, config_of_environment

__all__ = ["apply", "attaching", "give_up", "is_applied", "is_given_up", "revert"]

_KEY = "hf_trainer"
_GIVEN_UP = "_channel_metrics_given_up"


def apply(config: MetricsConfig | None = None) -> None:
    """Patch `Trainer.__init__`; a second call does nothing.

    Args:
        config: None means the file that CHANNEL_METRICS_CONFIG names, or else the default config.

    Raises:
        UnsupportedVersionError: this version of transformers lacks a method that is needed. Then
            nothing is patched.
    """
    if is_applied():
        return
    check_trainer(transformers.Trainer)
    body = attaching(config or config_of_environment(), whole_script=True)
    swap.wrap(transformers.Trainer, "__init__", body, key=_KEY)
    announce(
        f"channel metrics: patched transformers.Trainer.__init__ "
        f"(transformers {transformers.__version__})"
    )


def revert() -> None:
    """Put the original `Trainer.__init__` back. Trainers that exist already keep their metrics."""
    swap.unwrap(_KEY)


def is_applied() -> bool:
    """Whether `Trainer.__init__` is patched now."""
    return swap.is_wrapped(transformers.Trainer, "__init__", key=_KEY)


def give_up(trainer: Any) -> None:
    """Leave a trainer alone whose constructor still runs: an error was reported already."""
    setattr(trainer, _GIVEN_UP, True)


def is_given_up(trainer: Any) -> bool:
    """Whether `give_up` was called for this trainer."""
    return hasattr(trainer, _GIVEN_UP)


def attaching(config: MetricsConfig, *, whole_script: bool = False) -> Callable[..., None]:
    """Make a replacement for the constructor of a trainer, which also attaches the metrics.

    Args:
        config: the config of the metrics.
        whole_script: see `attach`.

    Returns:
        A function for `swap.wrap`, which takes the original constructor first.
    """
    on_error = (config.on_error or "warn") if whole_script else config.on_error

    def init_with_metrics(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        # A class with the mixin already has its metrics.
        if isinstance(trainer, ChannelMetricsMixin) or is_given_up(trainer):
            return
        guard = FaultGuard(on_error)
        with guard.guarded():
            attach(trainer, config, whole_script=whole_script)
        if guard.error is not None:
            detach(trainer)

    return init_with_metrics
