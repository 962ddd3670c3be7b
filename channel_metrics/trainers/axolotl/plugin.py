"""The plugin: it reads the config, keeps the channels of the records, and attaches the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import axolotl
from axolotl.integrations.base import BasePlugin
from axolotl.utils.data import sft, wrappers
from axolotl.utils.data import utils as data_utils
from pydantic import BaseModel

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.data.yaml import mapping
from channel_metrics.errors import ConfigError
from channel_metrics.trainers.axolotl.data import label_of, unique_rows
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.hf.columns import NAMES_COLUMN, KeepsNames, with_channel_column
from channel_metrics.trainers.patching import announce, config_of_environment, wrap_all

__all__ = ["ChannelMetricsArgs", "ChannelMetricsPlugin"]

_KEY = "axolotl"


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
        bodies = {
            (sft, "get_dataset_wrapper"): self._name,
            (wrappers, "wrap_dataset_for_tokenized_prompt"): _keep,
            (sft, "generate_dataset_hash_from_config"): self._hash,
            (data_utils, "_deduplicate_dataset"): unique_rows,
        }
        version = f"axolotl {axolotl.__version__}"
        wrap_all(bodies, key=_KEY, version=version, remedy="use 0.21, or remove the plugin")
        names = sorted({label_of(entry, _entries(cfg)) for entry in _entries(cfg)})
        announce(f"channel metrics: the channels of `datasets:` are {', '.join(names)}")

    def on_config_validation_error(self, cfg: Any) -> None:
        swap.unwrap(_KEY)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach the metrics."""
        attach(trainer, self.config)

    def post_train_unload(self, cfg: Any) -> None:
        # The next run of a sweep may be without the plugin.
        swap.unwrap(_KEY)

    def _name(self, original: Callable[..., Any], **given: Any) -> Any:
        """Give the records of one entry their channels, before Axolotl makes rows of them."""
        entry, cfg = given["dataset_config"], given["cfg"]
        listed = _entries(cfg)
        name = label_of(entry, listed if entry in listed else _entries(cfg, "test_datasets"))
        fields, dataset = self.config.label_fields, given["dataset"]
        given["dataset"] = with_channel_column(dataset, fields, NAMES_COLUMN, name)
        return original(**given)

    def _hash(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
        """Keep prepared data with channels apart from those without."""
        own = f"{original(*args, **kwargs)}|channels|{self.config.label_fields}"
        return str(data_utils.md5(own))


def _entries(cfg: Any, key: str = "datasets") -> list[Any]:
    return list(sft.datasets_with_name_generator(cfg.get(key) or []))


def _keep(original: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any) -> Any:
    """Let the rows of one strategy keep the channels of their records."""
    strategy.tokenize_prompt = KeepsNames(strategy.tokenize_prompt, strategy.supports_batched)
    return original(strategy, *args, **kwargs)


def _check(cfg: Any) -> None:
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
