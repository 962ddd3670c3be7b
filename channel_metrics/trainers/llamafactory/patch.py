"""Gives LLaMA-Factory's trainers channel metrics.

The patch of transformers' Trainer attaches the metrics to every trainer. Here, LLaMA-Factory's data
loader is patched so that rows keep the channels of their records:
- `get_dataset_list` remembers the name of each dataset;
- `align_dataset` adds the channel of each record: one of the `fields` of the config, or that name;
- `get_dataset_converter` makes converters that keep it;
- `_get_dataset_processor` makes processors whose rows keep the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llamafactory
from llamafactory.data import converter, loader

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.data.carried import carried_of
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.hf import patch as hf_patch
from channel_metrics.trainers.hf.columns import NAMES_COLUMN, KeepsNames, with_channel_column
from channel_metrics.trainers.llamafactory.data import NumberedRecords
from channel_metrics.trainers.patching import announce, config_of_environment, wrap_all

__all__ = ["apply", "is_applied", "revert"]

_KEY = "llamafactory"


def apply(config: MetricsConfig | None = None) -> None:
    """Patch the Trainer and LLaMA-Factory's data loader; a second call does nothing.

    Args:
        config: None means the file that CHANNEL_METRICS_CONFIG names, or else the default config.

    Raises:
        UnsupportedVersionError: this version lacks a function that is needed; nothing is patched.
    """
    if is_applied():
        return
    if config is not None:
        revert()
    bodies = {
        (loader, "get_dataset_list"): _name,
        (loader, "align_dataset"): _aligning(config or config_of_environment()),
        (converter, "get_dataset_converter"): _keeping,
        (loader, "_get_dataset_processor"): _process,
    }
    version = f"llamafactory {llamafactory.__version__}"
    try:
        wrap_all(bodies, key=_KEY, version=version, remedy="use 0.9.5")
        hf_patch.apply(config)
    except UnsupportedVersionError:
        revert()
        raise
    announce(f"channel metrics: patched llamafactory.data.loader {llamafactory.__version__}")


def revert() -> None:
    """Put the originals back; trainers made before keep their metrics."""
    swap.unwrap(_KEY)
    hf_patch.revert()


def is_applied() -> bool:
    """Whether LLaMA-Factory and the Trainer are patched now."""
    return swap.is_wrapped(loader, "align_dataset", key=_KEY) and hf_patch.is_applied()


def _name(original: Callable[..., Any], names: list[str] | None, *args: Any, **kwargs: Any) -> Any:
    found = original(names, *args, **kwargs)
    for attributes, name in zip(found, names or (), strict=True):
        attributes.channel = name
    return found


def _aligning(config: MetricsConfig) -> Callable[..., Any]:
    def align(original: Callable[..., Any], dataset: Any, attributes: Any, *args: Any) -> Any:
        name = attributes.channel
        # The collators for pairs and for KTO do not take them off the names.
        of_answers = attributes.ranking or attributes.kto_tag
        carried = None if of_answers else carried_of(config)
        dataset = with_channel_column(dataset, config.label_fields, NAMES_COLUMN, name, carried)
        return original(dataset, attributes, *args)

    return align


def _keeping(original: Callable[..., Any], *args: Any) -> KeepsNames:
    return KeepsNames(original(*args))


def _process(original: Callable[..., Any], *args: Any, **kwargs: Any) -> NumberedRecords:
    return NumberedRecords(original(*args, **kwargs))
