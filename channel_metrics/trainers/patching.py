"""What all patches use: the config that the environment names, and a line about the patch."""

from __future__ import annotations

import logging
import os
import re
import sys

from channel_metrics.config import MetricsConfig
from channel_metrics.data.yaml import CONFIG_VARIABLE, load_metrics_config
from channel_metrics.run_marks import mark

__all__ = ["announce", "config_of_environment"]


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
