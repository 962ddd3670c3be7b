"""Reads plain YAML files. No file can construct objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ConfigError
from channel_metrics.extras import need

__all__ = ["CONFIG_VARIABLE", "is_run", "load_metrics_config", "load_yaml", "mapping"]

# This environment variable holds the path of the YAML file of a MetricsConfig.
CONFIG_VARIABLE = "CHANNEL_METRICS_CONFIG"


def load_yaml(path: Path) -> Any:
    """The plain values in `path`.

    Raises `ConfigError` with file and line if it cannot be read, is no YAML, or would construct
    objects.
    """
    yaml = need("yaml", extra="cli")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a config file, but {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, but {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: expected plain YAML, but {getattr(error, 'problem', None) or error}; "
            "objects cannot be constructed in a config."
        ) from None


def load_metrics_config(path: str | Path) -> MetricsConfig:
    """The `MetricsConfig` in a YAML file: the whole file, or the section `metrics` of a run's file.

    Raises `ConfigError` for a wrong value or key; for a key, it names the nearest known one.
    """
    raw = load_yaml(Path(path))
    values = mapping(raw if raw is not None else {}, str(path))
    try:
        if is_run(values):
            if values.get("eval_domain", "all") != "all":
                raise ConfigError(
                    "eval_domain works in channel-metrics train only; list the channels in "
                    "metrics.eval_channels instead."
                )
            values = mapping(values.get("metrics") or {}, "metrics")
        return MetricsConfig.from_mapping(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def is_run(values: Mapping[str, Any]) -> bool:
    """Whether the values of a YAML file are those of `channel-metrics train`.

    Such a file has `sources`; in it, `metrics` is a section. In the file of a `MetricsConfig`,
    `metrics` is a list.
    """
    return "sources" in values or isinstance(values.get("metrics"), Mapping)


def mapping(value: Any, where: str) -> dict[str, Any]:
    """`value` as a dict; raises `ConfigError`, which names `where`, if it is no mapping."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected keys and values, but is {type(value).__name__}.")
    return dict(value)
