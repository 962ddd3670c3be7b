"""What the patches have in common: the config of the environment, and a line that says so."""

from __future__ import annotations

import logging
import os
import sys

from channel_metrics.config import MetricsConfig
from channel_metrics.data.yaml import CONFIG_VARIABLE, load_metrics_config

__all__ = ["announce", "config_of_environment"]


def announce(message: str) -> None:
    """One line that says what was patched, from rank 0; to stderr where logging hides it."""
    if os.environ.get("RANK", "0") != "0":
        return
    logger = logging.getLogger("channel_metrics")
    if logger.isEnabledFor(logging.INFO):
        logger.info(message)
    else:
        print(message, file=sys.stderr)


def config_of_environment() -> MetricsConfig:
    """The config in the file that CHANNEL_METRICS_CONFIG names; the defaults if it is not set."""
    path = os.environ.get(CONFIG_VARIABLE)
    return load_metrics_config(path) if path else MetricsConfig()
