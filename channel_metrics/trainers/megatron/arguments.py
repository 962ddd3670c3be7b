"""Our options on Megatron's command line, and the channels of the datasets it names."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ConfigError, UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.megatron.names import (
    MOCK,
    blend_paths,
    names_in_order,
    refuse_axes_by_field,
)
from channel_metrics.trainers.megatron.reserved import megatron_keys

__all__ = [
    "add_arguments",
    "config_of",
    "data_paths",
    "declared_names",
    "is_on",
    "name_by_path",
    "refuse_captures",
    "session_of",
    "validate",
]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group "channel metrics" to Megatron's parser.

    Args:
        parser: the parser, which is changed.

    Returns:
        The same parser.
    """
    group = parser.add_argument_group(title="channel metrics")
    group.add_argument(
        "--channels",
        nargs="*",
        default=None,
        metavar="NAME",
        help="Log loss, token accuracy, tokens and share per channel. One NAME per data set, in "
        "the order of the blend; without names they are taken from the paths. With --sft, the "
        "channels of the conversations.",
    )
    group.add_argument(
        "--channels-config",
        type=Path,
        default=None,
        metavar="FILE",
        help="YAML with fields, metrics, key_format and so on.",
    )
    group.add_argument(
        "--channels-axes",
        type=Path,
        default=None,
        metavar="FILE",
        help="YAML with further labels of the channels: {axis: {channel: label}}.",
    )
    group.add_argument(
        "--channels-metrics",
        nargs="+",
        default=None,
        metavar="METRIC",
        help="What is logged per channel, e.g. loss token_acc ppl tokens share tokens_total.",
    )
    return parser


def is_on(args: Any) -> bool:
    """Whether `--channels` is among the parsed arguments `args`."""
    return getattr(args, "channels", None) is not None


def config_of(args: Any) -> MetricsConfig:
    """Make the config that the options describe.

    Args:
        args: Megatron's parsed arguments.

    Raises:
        ConfigError: the file of `--channels-config`, or a setting, is not valid.
    """
    config = MetricsConfig()
    if args.channels_config is not None:
        from channel_metrics.data.yaml import load_metrics_config

        config = load_metrics_config(args.channels_config)
    if getattr(args, "channels_axes", None) is not None:
        from channel_metrics.data.yaml import load_yaml, mapping

        axes = mapping(load_yaml(args.channels_axes), str(args.channels_axes))
        config = dataclasses.replace(config, axes={**config.axes, **axes})
    if args.channels_metrics is not None:
        config = dataclasses.replace(config, metrics=tuple(args.channels_metrics))
    return config


def validate(args: Any) -> None:
    """Check our options, and Megatron's options that do not work with them.

    Args:
        args: Megatron's parsed arguments.

    Raises:
        ConfigError: an option is wrong, or does not work with `--channels`.
        UnsupportedVersionError: `--channels` was given together with `--yaml-cfg`.
    """
    if not is_on(args):
        for option in ("channels_config", "channels_axes", "channels_metrics"):
            if getattr(args, option, None) is not None:
                name = "--" + option.replace("_", "-")
                raise ConfigError(f"{name} was given without --channels; add --channels.")
        return
    _refuse_unsupported(args, config_of(args))
    session_of(args)


def session_of(args: Any) -> ChannelMetrics:
    """Open the session of a run.

    Args:
        args: Megatron's parsed arguments.

    Raises:
        ConfigError: a channel would have a log key that is taken, see `ChannelMetrics`.
    """
    config = config_of(args)
    names = dict.fromkeys((*declared_names(args), *config.channels))
    session = ChannelMetrics(
        dataclasses.replace(config, channels=tuple(names)),
        reserved=megatron_keys(getattr(args, "validation_set_names", None) or ()),
    )
    if not getattr(args, "sft", False) and not _is_external(args):
        # The data options name all channels, so wrong names can be found now.
        session.check_eval_channels()
    return session


def declared_names(args: Any) -> list[str]:
    """List the channels that are known before any data is read, in order, without repetitions.

    Args:
        args: Megatron's parsed arguments.

    Raises:
        ConfigError: `--channels` has not one name for each dataset.
    """
    has_other_sources = getattr(args, "sft", False) or _is_external(args)
    # Called in any case, because it checks the names against the datasets.
    names = name_by_path(args).values()
    return list(dict.fromkeys(args.channels if has_other_sources else names))


def name_by_path(args: Any) -> dict[str | None, str]:
    """Find the channel of each dataset.

    With --sft, the names given are usually those of conversations, and datasets are named by their
    paths. A data loader of the script's own has no paths.

    Args:
        args: Megatron's parsed arguments.

    Returns:
        {path of a dataset: its channel}, in the order of the blend. Mock data has the path None.

    Raises:
        ConfigError: `--channels` has not one name for each dataset.
    """
    given = list(args.channels or ())
    if _is_external(args):
        return {}
    paths = data_paths(args)
    if not paths:
        return _mock_name(args, given)
    if getattr(args, "sft", False) and not _fits(args, given, paths):
        given = []
    return names_in_order(_blends(args), given)


def data_paths(args: Any) -> list[str]:
    """The paths of the datasets of all splits that `args` name, in order, without repetitions."""
    return list(dict.fromkeys(path for blend in _blends(args) for path in blend))


def _blends(args: Any) -> list[list[str]]:
    from megatron.training.utils import get_blend_and_blend_per_split

    return blend_paths(*get_blend_and_blend_per_split(args))


def _is_external(args: Any) -> bool:
    return getattr(args, "dataloader_type", None) == "external"


def _fits(args: Any, given: Sequence[str], paths: Sequence[str]) -> bool:
    """Whether there is one name for each of several SFT datasets."""
    return len(paths) > 1 and len(given) == len(paths)


def _mock_name(args: Any, given: list[str]) -> dict[str | None, str]:
    if not getattr(args, "mock_data", False):
        return {}
    if len(given) > 1:
        raise ConfigError(
            f"--channels got {len(given)} names ({', '.join(given)}), but --mock-data is one "
            "data set; give one name, or none."
        )
    return {None: given[0] if given else MOCK}


def _refuse_unsupported(args: Any, config: MetricsConfig) -> None:
    if getattr(args, "yaml_cfg", None) is not None:
        raise UnsupportedVersionError("--channels does not work with --yaml-cfg; use arguments.")
    refuse_captures(args, "--cuda-graph-impl or --cuda-graph-scope")
    if getattr(args, "perform_rl_step", False):
        raise ConfigError("--channels does not work with --perform-rl-step; leave it out.")
    if getattr(args, "hybrid_context_parallel", False) and "samples" in config.metrics:
        raise ConfigError(
            "samples cannot be counted with --hybrid-context-parallel, which spreads one sequence "
            "over several micro-batches of several ranks; leave samples out of the metrics."
        )
    if getattr(args, "sft", False):
        return
    refuse_axes_by_field(config)
    if config.channels:
        raise ConfigError(
            "the file of --channels-config lists channels, but the data options name them here; "
            "give the names to --channels."
        )


def refuse_captures(settings: Any, where: str) -> None:
    """Raise `ConfigError` if the settings make CUDA graphs of whole iterations.

    Args:
        settings: Megatron's parsed arguments, or a config with the same names.
        where: where the user sets this, for the message.
    """
    if _captures_iterations(settings):
        raise ConfigError(
            f"channel metrics do not work with CUDA graphs of a full iteration (full_iteration in "
            f"{where}): a captured iteration runs no Python that could count; leave full_iteration "
            "out, so that only layers are captured."
        )


def _captures_iterations(args: Any) -> bool:
    """Whether whole iterations become CUDA graphs, in the options of core 0.13 to 0.19.

    Core 0.18 and later have `--cuda-graph-impl full_iteration`. Earlier versions have a scope
    `full_iteration` of the local implementation. That one is chosen by `--cuda-graph-impl local`,
    or by `--enable-cuda-graph` up to 0.14.
    """
    implementation = getattr(args, "cuda_graph_impl", None)
    is_local = implementation == "local" or bool(getattr(args, "enable_cuda_graph", False))
    scopes = getattr(args, "cuda_graph_scope", None) or ()
    scopes = scopes.split(",") if isinstance(scopes, str) else scopes
    scopes = scopes if isinstance(scopes, (list, tuple)) else [scopes]
    # Scopes are names in some versions, and members of an enum in others.
    names = {getattr(scope, "name", scope) for scope in scopes}
    return implementation == "full_iteration" or (is_local and "full_iteration" in names)
