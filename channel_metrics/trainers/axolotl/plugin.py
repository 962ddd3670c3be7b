"""The plugin: it reads the config, keeps the channels of the records, and attaches the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import axolotl
from axolotl.integrations.base import BasePlugin
from axolotl.utils.data import sft
from axolotl.utils.data import utils as data_utils
from pydantic import BaseModel

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.data.yaml import mapping
from channel_metrics.errors import ConfigError, UnsupportedVersionError
from channel_metrics.trainers.axolotl.data import UniqueRows, label_of, with_channels
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.patching import announce, config_of_environment

__all__ = ["ChannelMetricsArgs", "ChannelMetricsPlugin"]

_KEY = "axolotl"
# The functions of Axolotl that are wrapped.
_HOOKS = (
    (sft, "_load_and_process_single_dataset"),
    (sft, "generate_dataset_hash_from_config"),
    (data_utils, "_deduplicate_dataset"),
)


class ChannelMetricsArgs(BaseModel):
    """What the plugin adds to Axolotl's YAML file: a section with the keys of `MetricsConfig`."""

    channel_metrics: dict[str, Any] | None = None


class ChannelMetricsPlugin(BasePlugin):  # type: ignore[misc]  # Axolotl has no types
    """Named under `plugins:` in Axolotl's YAML file."""

    config: MetricsConfig

    def get_input_args(self) -> str:
        return "channel_metrics.trainers.axolotl.ChannelMetricsArgs"

    def register(self, cfg: Any) -> None:
        """Check the config, and wrap the functions that load datasets.

        Raises:
            ConfigError: the metrics cannot be used with this config.
            UnsupportedVersionError: Axolotl lacks a function that is wrapped.
        """
        _check(cfg)
        given = cfg.get("channel_metrics")
        if given is None:
            self.config = config_of_environment()
        else:
            self.config = MetricsConfig.from_mapping(mapping(given, "channel_metrics"))
        # A sweep registers the plugin once per run.
        swap.unwrap(_KEY)
        bodies: tuple[Callable[..., Any], ...] = (self._load, self._hash, _unique)
        for (owner, name), body in zip(_HOOKS, bodies, strict=True):
            swap.wrap(owner, name, body, key=_KEY)
        entries = list(sft.datasets_with_name_generator(cfg.get("datasets") or []))
        names = sorted({label_of(entry, entries) for entry in entries})
        announce(f"channel metrics: the channels of `datasets:` are {', '.join(names)}")

    def on_config_validation_error(self, cfg: Any) -> None:
        swap.unwrap(_KEY)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach the metrics."""
        attach(trainer, self.config)

    def post_train_unload(self, cfg: Any) -> None:
        # The next run of a sweep may be without the plugin.
        swap.unwrap(_KEY)

    def _load(self, original: Callable[..., Any], **given: Any) -> Any:
        """Load one entry of `datasets:` or `test_datasets:`. The rows have channels."""
        entry, cfg = given["dataset_config"], given["cfg"]
        listed = cfg.datasets if given["split"] == "train" else cfg.test_datasets
        entries = list(sft.datasets_with_name_generator(listed))
        return with_channels(original, given, label_of(entry, entries), self.config.label_fields)

    def _hash(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
        """Keep prepared data with channels apart from those without."""
        own = f"{original(*args, **kwargs)}|channels|{self.config.label_fields}"
        return str(data_utils.md5(own))


def _unique(original: Callable[..., Any], dataset: Any, *args: Any, **kwargs: Any) -> Any:
    """Find duplicates without regard to the channel. The first of several is kept."""
    return original(UniqueRows(dataset), *args, **kwargs)


def _check(cfg: Any) -> None:
    missing = [name for owner, name in _HOOKS if not hasattr(owner, name)]
    if missing:
        raise UnsupportedVersionError(
            f"channel metrics wrap {len(_HOOKS)} functions of axolotl.utils.data, but axolotl "
            f"{axolotl.__version__} lacks {', '.join(missing)}; use 0.21, or remove the plugin."
        )
    for key in ("rl", "reward_model", "process_reward_model"):
        if cfg.get(key):
            raise ConfigError(
                "channel metrics are for Axolotl's supervised fine-tuning, but this config has "
                f"`{key}: {cfg[key]}`; remove the plugin for this run."
            )
    if cfg.get("pretraining_dataset"):
        raise ConfigError(
            "channel metrics need `datasets:`, but this config has `pretraining_dataset`, which is "
            "one source whose texts Axolotl joins; list the texts in `datasets:` with `type: "
            "completion`, or remove the plugin."
        )
    if cfg.get("streaming") and cfg.get("sample_packing"):
        raise ConfigError(
            "with `streaming` and `sample_packing`, Axolotl reads only the first of `datasets:` "
            "and packs it before any collator; set one of them to false, or remove the plugin."
        )
    if (cfg.get("context_parallel_size") or 1) > 1:
        raise ConfigError(
            "channel metrics need whole rows, but with `context_parallel_size: "
            f"{cfg['context_parallel_size']}` Axolotl cuts them; remove it, or the plugin."
        )
