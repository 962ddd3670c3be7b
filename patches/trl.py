"""Importing this gives TRL's trainers channel metrics, packing included, in unmodified scripts.

    import channel_metrics.patches.trl

It applies `channel_metrics.patches.hf_trainer`, which attaches the metrics to every trainer, and
patches `SFTTrainer._prepare_dataset`, where packing would lose the channels. `revert()` undoes
both for trainers made later; importing or applying twice patches once.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import trl
from channel_metrics.patches import announce, hf_trainer
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import SFTTrainer

from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard
from channel_metrics.data.yaml import CONFIG_VARIABLE, load_metrics_config
from channel_metrics.trainers.trl.packing import check_packing
from channel_metrics.trainers.trl.sft import SFTChannelMetricsMixin, prepare_dataset

__all__ = ["apply", "is_applied", "revert"]

_MARK = "_channel_metrics_original_prepare"


def apply(config: MetricsConfig | None = None) -> None:
    """Patch the Trainer and SFTTrainer's packing; a second call does nothing.

    config: None takes what `hf_trainer` takes. Raises `UnsupportedVersionError`, and patches
    nothing more, if this trl packs in another way.
    """
    if is_applied():
        return
    check_packing(getattr(SFTTrainer, "_prepare_dataset", None), pack_dataset)
    if config is not None:
        # Importing it has applied it, with the config of the environment.
        hf_trainer.revert()
    hf_trainer.apply(config)
    original = SFTTrainer._prepare_dataset
    if hasattr(original, _MARK):
        return
    path = os.environ.get(CONFIG_VARIABLE)
    chosen = config or (load_metrics_config(path) if path else MetricsConfig())

    @functools.wraps(original)
    def prepare_with_channels(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepare = functools.partial(original, self)
        # A class with the mixin has packed the channels already, and calls this without packing.
        if isinstance(self, SFTChannelMetricsMixin):
            return prepare(*args, **kwargs)
        with FaultGuard(chosen.on_error).guarded():
            return prepare_dataset(self, prepare, chosen, *args, **kwargs)
        return prepare(*args, **kwargs)

    setattr(prepare_with_channels, _MARK, original)
    trainer_class: Any = SFTTrainer
    trainer_class._prepare_dataset = prepare_with_channels
    announce(f"channel metrics: patched trl.SFTTrainer._prepare_dataset (trl {trl.__version__})")


def revert() -> None:
    """Put the originals back; trainers made before keep their metrics."""
    original = getattr(SFTTrainer._prepare_dataset, _MARK, None)
    if original is not None:
        trainer_class: Any = SFTTrainer
        trainer_class._prepare_dataset = original
    hf_trainer.revert()


def is_applied() -> bool:
    """Whether both patches are applied now."""
    return hasattr(SFTTrainer._prepare_dataset, _MARK) and hf_trainer.is_applied()


apply()
