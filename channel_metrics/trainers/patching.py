"""What all patches use: functions that are wrapped, the config of the environment, and a line."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.data.yaml import CONFIG_VARIABLE, load_metrics_config
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.run_marks import mark

__all__ = ["announce", "config_of_environment", "wrap_all"]


def wrap_all(
    bodies: Mapping[tuple[Any, str], Any],
    *,
    key: str,
    version: str,
    remedy: str,
    everywhere_in: str | None = None,
) -> None:
    """Wrap functions of a trainer's package: all of them or, if one is missing, none.

    Args:
        bodies: {(class, module or name of a module, name of a function): what runs in its place},
            see `swap.wrap`.
        key, everywhere_in: as in `swap.wrap`.
        version: the package and its version, for the message.
        remedy: what to do if this version lacks a function.

    Raises:
        UnsupportedVersionError: it lacks a function.
    """
    found: dict[tuple[Any, str], Any] = {}
    lacking: dict[str, None] = {}  # each once, in order
    for (owner, name), body in bodies.items():
        try:
            place = import_module(owner) if isinstance(owner, str) else owner
        except ModuleNotFoundError as error:
            lacking[f"{owner} ({error})"] = None
            continue
        found[place, name] = body
        if not hasattr(place, name):
            lacking[f"{place.__name__}.{name}"] = None
    if lacking:
        raise UnsupportedVersionError(
            f"channel metrics wrap functions that {version} lacks: {', '.join(lacking)}; {remedy}."
        )
    for (place, name), body in found.items():
        swap.wrap(place, name, body, key=key, everywhere_in=everywhere_in)


def announce(message: str) -> None:
    """Report what was patched, on rank 0 only, and once per `channel-metrics run`.

    Args:
        message: one line. It goes to the log, or to stderr if the log does not show it.
    """
    if os.environ.get("RANK", "0") != "0" or not mark(re.sub(r"\W+", "_", message)[:200]):
        return
    logger = logging.getLogger("channel_metrics")
    if logger.isEnabledFor(logging.INFO):
        logger.info(message)
    else:
        print(message, file=sys.stderr)


def config_of_environment() -> MetricsConfig:
    """Read the file that CHANNEL_METRICS_CONFIG names.

    Returns:
        The config of the file; the default config if the variable is not set.

    Raises:
        ConfigError: the file cannot be read, or holds settings that are not allowed.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    return load_metrics_config(path) if path else MetricsConfig()
