"""The observers that the config names: functions by import path, and the stream."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ConfigError
from channel_metrics.observers.stream import Session, WindowStream
from channel_metrics.windows import Window

__all__ = ["hook", "observers_of"]


def observers_of(config: MetricsConfig, session: Session) -> list[Callable[[Window], Any]]:
    """Import the functions of `on_window`, and open the stream.

    Raises:
        ConfigError: as `hook`.
    """
    found = [hook(path) for path in config.on_window]
    return [*found, WindowStream(Path(config.stream), session)] if config.stream else found


def hook(path: str) -> Callable[[Window], Any]:
    """The function that `module:name` names.

    Raises:
        ConfigError: the path has another form, or the module or name cannot be imported.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ConfigError(f"an entry of on_window must be `module:function`, but is {path!r}.")
    try:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"on_window names {path!r}, but that cannot be imported ({error}); a module beside the "
            "script is found, others must be installed or on PYTHONPATH."
        ) from error
    if not callable(found):
        raise ConfigError(f"on_window names {path!r}, which is no function, but {found!r}.")
    return found
