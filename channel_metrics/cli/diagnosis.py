"""What `channel-metrics doctor` finds out: what is installed and what would be used.

Each patch is tried in a process of its own, so this one imports no trainer and no torch.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import channel_metrics
from channel_metrics.acting import Budget, Sampler, Section, StopWhen, goals
from channel_metrics.alerting import Alerts, Outliers
from channel_metrics.cli.children import check_patches
from channel_metrics.config import MetricsConfig
from channel_metrics.core.labels import channels_of, winning_field
from channel_metrics.data.jsonl import read_jsonl
from channel_metrics.data.yaml import CONFIG_VARIABLE, load_metrics_config
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.startup.sitecustomize import PATCHES

__all__ = ["PATCH_MODULES", "Report", "diagnose"]

Report = dict[str, Any]

# Settings of the config that are mappings, and where their own defaults stand.
_SECTIONS: dict[str, type[Section]] = {
    "budget": Budget,
    "stop_when": StopWhen,
    "sampler": Sampler,
    "alerts": Alerts,
    "outliers": Outliers,
}
# {name that `--patch` takes: the module that is named after it}
PATCH_MODULES = {name: list(modules.values())[-1] for name, modules in PATCHES.items()}

# Distributions whose versions matter.
_DISTRIBUTIONS = (
    *("torch", "transformers", "accelerate", "datasets", "trl", "peft", "deepspeed", "ms_swift"),
    *(
        "megatron-core",
        "megatron-bridge",
        "mcore-bridge",
        "transformer-engine",
        "liger-kernel",
        "cut-cross-entropy",
        "lightning",
        "pytorch-lightning",
        "flash-attn",
    ),
    *("axolotl", "llamafactory", "msgspec", "pyyaml", "typer"),
)

_TRY = """
import importlib, json, sys
reason = None
try:
    importlib.import_module(sys.argv[1]).apply()
except ModuleNotFoundError as error:
    reason = f"{error.name} is not installed"
except Exception as error:  # whatever it is, it is the answer
    reason = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(reason))
"""
_SECONDS_PER_PATCH = 600


def diagnose(
    patches: Sequence[str] = (), config: Path | None = None, data: Sequence[Path] = ()
) -> Report:
    """Collect what a bug report needs.

    Args:
        patches: names of `PATCHES` to try; by default those whose package is installed.
        config: a YAML file with a `MetricsConfig`; by default that of CHANNEL_METRICS_CONFIG.
        data: JSONL files.

    Returns:
        The sections `versions`, `patches`, `config` and `data`, which `json` can write.

    Raises:
        ConfigError: for an unknown patch.
    """
    check_patches(patches)
    found = _config(config)
    fields = found["values"]["fields"] if "values" in found else MetricsConfig().fields
    return {
        "versions": _versions(),
        "patches": _patches(patches),
        "config": found,
        "data": {str(path): _data(path, fields) for path in data},
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "channel_metrics": channel_metrics.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
    }
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _patches(chosen: Sequence[str]) -> dict[str, str | None]:
    """{patch: why it does not apply, or None}"""
    missing = {name: _missing_package(name) for name in chosen or PATCHES}
    tried = {name: _start(name) for name, package in missing.items() if package is None}
    return {
        name: f"{package} is not installed" if package else _reason(tried[name])
        for name, package in missing.items()
    }


def _missing_package(patch: str) -> str | None:
    """The top-level package that a patch needs and that is not installed."""
    needed = dict.fromkeys(module.partition(".")[0] for module in PATCHES[patch])
    return next((name for name in needed if find_spec(name) is None), None)


def _start(patch: str) -> subprocess.Popen[str]:
    # The config has a section of its own.
    env = {name: value for name, value in os.environ.items() if name != CONFIG_VARIABLE}
    command = [sys.executable, "-c", _TRY, PATCH_MODULES[patch]]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _reason(process: subprocess.Popen[str]) -> str | None:
    try:
        output, _ = process.communicate(timeout=_SECONDS_PER_PATCH)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"its import took longer than {_SECONDS_PER_PATCH} s"
    if process.returncode:
        return f"its process ended with exit code {process.returncode}"
    reason: str | None = json.loads(output.splitlines()[-1])
    return reason


def _config(path: Path | None) -> Report:
    """Where the config comes from, and its values, or the error of its file."""
    given = os.environ.get(CONFIG_VARIABLE)
    source = str(path) if path else f"{given} (of {CONFIG_VARIABLE})" if given else "the defaults"
    try:
        chosen = path or given
        config = load_metrics_config(chosen) if chosen else MetricsConfig()
    except ChannelMetricsError as error:
        return {"from": source, "error": str(error)}
    values = asdict(config)
    for name, section in _SECTIONS.items():
        found = section.of(values[name])
        values[name] = {} if found is None else asdict(found)
    return {"from": source, "values": {**values, "stop_at": goals(config.stop_at)}}


def _data(path: Path, fields: Sequence[str]) -> Report:
    """How many records have a channel, in which field, and which ones there are."""
    records, found_in, channels = 0, Counter[str](), Counter[str]()
    try:
        for _, record in read_jsonl(path):
            records += 1
            found = winning_field(record, fields)
            if found is not None:
                found_in[found] += 1
                channels.update(name for name in channels_of(record, [found]) if name is not None)
    except ChannelMetricsError as error:
        return {"error": str(error)}
    counts = {name: found_in[name] for name in fields if found_in[name]}
    return {"records": records, "fields": counts, "channels": dict(channels.most_common())}
