"""Importing this gives every transformers Trainer channel metrics, in an unmodified script.

    import channel_metrics.patches.hf_trainer

`Trainer.__init__` is the one thing that is patched: each trainer that is made afterwards gets
`channel_metrics.trainers.hf.attach`. The config is read from the YAML file that the environment
variable CHANNEL_METRICS_CONFIG names, if it is set. `revert()` undoes it for trainers made
later; importing or applying twice patches once.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import transformers
from channel_metrics.patches import announce

from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard
from channel_metrics.data.yaml import CONFIG_VARIABLE, load_metrics_config
from channel_metrics.trainers.hf import ChannelMetricsMixin, attach, check_trainer

__all__ = ["apply", "is_applied", "revert"]

_MARK = "_channel_metrics_original_init"
# Not typed: to mypy a method of a class is no variable.
_trainer_class: Any = transformers.Trainer


def apply(config: MetricsConfig | None = None) -> None:
    """Patch `Trainer.__init__`; a second call does nothing.

    config: None reads CHANNEL_METRICS_CONFIG, or takes the defaults. Raises
    `UnsupportedVersionError`, and patches nothing, if this transformers lacks what is needed.
    """
    if is_applied():
        return
    check_trainer(transformers.Trainer)
    chosen = config or _config_from_environment()
    original = _trainer_class.__init__

    @functools.wraps(original)
    def init_with_metrics(self: transformers.Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A class with the mixin brings its own config.
        if not isinstance(self, ChannelMetricsMixin):
            with FaultGuard(chosen.on_error).guarded():
                attach(self, chosen)

    setattr(init_with_metrics, _MARK, original)
    _trainer_class.__init__ = init_with_metrics
    announce(
        f"channel metrics: patched transformers.Trainer.__init__ "
        f"(transformers {transformers.__version__})"
    )


def revert() -> None:
    """Put the original `Trainer.__init__` back; trainers made before keep their metrics."""
    original = getattr(_trainer_class.__init__, _MARK, None)
    if original is not None:
        _trainer_class.__init__ = original


def is_applied() -> bool:
    """Whether `Trainer.__init__` is patched now."""
    return hasattr(_trainer_class.__init__, _MARK)


def _config_from_environment() -> MetricsConfig:
    path = os.environ.get(CONFIG_VARIABLE)
    return load_metrics_config(path) if path else MetricsConfig()


apply()
