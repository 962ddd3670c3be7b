"""Gives TRL's trainers channel metrics, packing included.

It applies the patch of transformers' Trainer, which attaches the metrics to every trainer. It also
patches `SFTTrainer._prepare_dataset`, because packing would drop the channels there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import trl
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import SFTTrainer

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard
from channel_metrics.trainers.hf import patch as hf_patch
from channel_metrics.trainers.patching import announce, config_of_environment
from channel_metrics.trainers.trl.packing import check_packing
from channel_metrics.trainers.trl.sft import SFTChannelMetricsMixin, prepare_dataset

__all__ = ["apply", "is_applied", "revert"]

_KEY = "trl"


def apply(config: MetricsConfig | None = None) -> None:
    """Patch the Trainer and SFTTrainer's packing; a second call does nothing.

    Args:
        config: replaces the config of the patch `hf_trainer`, if that is applied. None keeps it,
            and takes that of the file in CHANNEL_METRICS_CONFIG, or the defaults.

    Raises:
        UnsupportedVersionError: this trl packs in another way; nothing is patched.
    """
    if is_applied():
        return
    check_packing(getattr(SFTTrainer, "_prepare_dataset", None), pack_dataset)
    if config is not None:
        revert()
    hf_patch.apply(config)
    body = _keeping_channels(config or config_of_environment())
    swap.wrap(SFTTrainer, "_prepare_dataset", body, key=_KEY)
    announce(f"channel metrics: patched trl.SFTTrainer._prepare_dataset (trl {trl.__version__})")


def revert() -> None:
    """Put the originals back; trainers made before keep their metrics."""
    swap.unwrap(_KEY)
    hf_patch.revert()


def is_applied() -> bool:
    """Whether both patches are applied now."""
    packs = swap.is_wrapped(SFTTrainer, "_prepare_dataset", key=_KEY)
    return packs and hf_patch.is_applied()


def _keeping_channels(config: MetricsConfig) -> Callable[..., Any]:
    def prepare_with_channels(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        prepare = functools.partial(original, trainer)
        # A class with the mixin has packed the channels already. It calls this without packing.
        if isinstance(trainer, SFTChannelMetricsMixin) or hf_patch.is_given_up(trainer):
            return prepare(*args, **kwargs)
        with FaultGuard(config.on_error or "warn").guarded():
            return prepare_dataset(trainer, prepare, config, *args, **kwargs)
        # Without this, `attach` would fail later, and its advice is not for a patch.
        hf_patch.give_up(trainer)
        return prepare(*args, **kwargs)

    return prepare_with_channels
