"""Importing this gives ms-swift's trainers channel metrics, in unmodified scripts and commands.

    swift sft ... --external_plugins patches/ms_swift.py
    import channel_metrics.patches.ms_swift

Patched are `Seq2SeqTrainer.__init__` (each trainer that is made afterwards gets
`channel_metrics.trainers.hf.attach`), `RowPreprocessor.__call__` (which fills the column `channel`
of a dataset from the fields of the config, for ms-swift drops all other columns), and the command
line, whose child processes load this plugin too. The config is read from the YAML file that the
environment variable CHANNEL_METRICS_CONFIG names, if it is set. `revert()` undoes it for what is
made later; importing or applying twice patches once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import swift
from channel_metrics.patches import announce, hide_from_imports
from swift.cli import main as swift_cli
from swift.dataset import RowPreprocessor
from swift.pipelines import SwiftSft
from swift.trainers import Seq2SeqTrainer

from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard
from channel_metrics.data.yaml import CONFIG_VARIABLE, load_metrics_config
from channel_metrics.trainers.hf import attach, check_trainer
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.swift.data import CHANNEL_COLUMN, with_channel_column
from channel_metrics.trainers.swift.loss import check_loss_functions
from channel_metrics.trainers.swift_megatron.patch import (
    patch_megatron_trainer,
    unpatch_megatron_trainer,
)

__all__ = ["apply", "is_applied", "revert"]

_MARK = "_channel_metrics_original"
_PLUGINS_OPTION = "--external_plugins"
_COMMANDS = ("sft", "pt")
# ms-swift puts the folder of a plugin first on the path, where trl.py would stand for trl.
_FOLDER = os.path.dirname(os.path.abspath(__file__))
hide_from_imports(_FOLDER)
# Processes that are spawned from this one take over its path, but nothing that hides a folder.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _FOLDER]


def apply(config: MetricsConfig | None = None) -> None:
    """Patch ms-swift; a second call does nothing.

    config: None reads CHANNEL_METRICS_CONFIG, or takes the defaults. Raises
    `UnsupportedVersionError`, and patches nothing, if this ms-swift lacks what is needed.
    """
    if is_applied():
        return
    check_trainer(Seq2SeqTrainer)
    check_loss_functions()
    path = os.environ.get(CONFIG_VARIABLE)
    chosen = config or (load_metrics_config(path) if path else MetricsConfig())
    patch_megatron_trainer(chosen)
    for owner, name, patched in (
        (Seq2SeqTrainer, "__init__", _attaching(chosen)),
        (SwiftSft, "_prepare_dataset", _reaching_megatron(chosen)),
        (RowPreprocessor, "__call__", _filling(chosen)),
        (swift_cli, "parse_yaml_args", _with_plugin),
    ):
        _replace(owner, name, patched)
    announce(f"channel metrics: patched ms-swift {swift.__version__} (Seq2SeqTrainer)")


def revert() -> None:
    """Put the originals back; trainers made before keep their metrics."""
    unpatch_megatron_trainer()
    for owner, name in (
        (Seq2SeqTrainer, "__init__"),
        (SwiftSft, "_prepare_dataset"),
        (RowPreprocessor, "__call__"),
        (swift_cli, "parse_yaml_args"),
    ):
        original = getattr(getattr(owner, name), _MARK, None)
        if original is not None:
            setattr(owner, name, original)


def is_applied() -> bool:
    """Whether ms-swift is patched now."""
    return hasattr(Seq2SeqTrainer.__init__, _MARK)


def _replace(owner: Any, name: str, patched: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return patched(original, *args, **kwargs)

    setattr(replaced, _MARK, original)
    setattr(owner, name, replaced)


def _attaching(config: MetricsConfig) -> Callable[..., None]:
    def init_with_metrics(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        # A class with the mixin brings its own config.
        if not isinstance(trainer, ChannelMetricsMixin):
            with FaultGuard(config.on_error).guarded():
                attach(trainer, config)

    return init_with_metrics


def _reaching_megatron(config: MetricsConfig) -> Callable[..., Any]:
    """`megatron sft` prepares its data as `swift sft` does; by then its own trainer is imported."""

    def prepare_dataset(original: Any, *args: Any, **kwargs: Any) -> Any:
        patch_megatron_trainer(config)
        return original(*args, **kwargs)

    return prepare_dataset


def _filling(config: MetricsConfig) -> Callable[..., Any]:
    def preprocess(original: Any, preprocessor: Any, dataset: Any, *args: Any, **kw: Any) -> Any:
        # With --columns the user says which column the channel is.
        if CHANNEL_COLUMN not in preprocessor.origin_columns.values():
            with FaultGuard(config.on_error).guarded():
                dataset = with_channel_column(dataset, config.fields)
        return original(preprocessor, dataset, *args, **kw)

    return preprocess


def _with_plugin(original: Any, argv: list[str]) -> None:
    """The command line starts processes that know nothing of this one's patches."""
    original(argv)
    # Other commands may not have the option; here, `argv` comes without the command.
    if sys.argv[1:2] and sys.argv[1] in _COMMANDS:
        _add_plugin(argv, os.path.abspath(__file__))


def _add_plugin(argv: list[str], plugin: str) -> None:
    for index, argument in enumerate(argv):
        option, _, value = argument.partition("=")
        if option == _PLUGINS_OPTION:
            argv[index : index + 1] = [option, plugin, *([value] if value else [])]
            return
    argv += [_PLUGINS_OPTION, plugin]


apply()
