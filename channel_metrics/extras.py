"""Optional packages: imported when they are needed, with a remedy where they are missing."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from channel_metrics.errors import ChannelMetricsError

__all__ = ["check_installed", "need"]


def check_installed(*modules: str, extra: str) -> None:
    """Raise a `ChannelMetricsError` if a package is missing, before a long work needs it."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ChannelMetricsError(
            f"this needs {', '.join(missing)}, not installed; run: "
            f"pip install 'channel_metrics[{extra}]'"
        )


def need(module: str, *, extra: str) -> Any:
    """The module; a `ChannelMetricsError` that names the extra to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there and lacks a part of its own is another problem: shown as it is.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ChannelMetricsError(
            f"this needs the package {error.name!r}, which is not installed; run: "
            f"pip install 'channel_metrics[{extra}]'"
        ) from None
