"""Run somebody's training script, unmodified, with patches applied first.

What the script sees is what it would see from `python SCRIPT ARGS...`: its `sys.argv`, its folder
first on `sys.path`, `__name__ == "__main__"`; its exit code, its traceback and the signals it gets
are its own.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from channel_metrics.data.yaml import CONFIG_VARIABLE, load_metrics_config
from channel_metrics.errors import ConfigError

__all__ = ["PATCH_MODULES", "run_script"]


# The names that `--patch` takes, and the module whose `apply` it is.
PATCH_MODULES = {
    "hf_trainer": "channel_metrics.trainers.hf.patch",
    "megatron": "channel_metrics.trainers.megatron.patch",
    "ms_swift": "channel_metrics.trainers.swift.patch",
    "trl": "channel_metrics.trainers.trl.patch",
}


def run_script(
    script: str, args: Sequence[str], patches: Sequence[str], config: Path | None = None
) -> None:
    """Apply `patches` in order, then run `script` as the main program with `args`.

    config: a YAML file with a `MetricsConfig`, for the patches of this process and, by the
    environment, of the processes that it starts.

    Raises `ConfigError` for an unknown patch or a missing script, before anything runs.
    """
    for name in patches:
        if name not in PATCH_MODULES:
            raise ConfigError(f"unknown patch {name!r}; there are {', '.join(PATCH_MODULES)}.")
    if not os.path.exists(script):
        raise ConfigError(
            f"the script {script!r} does not exist; options of ours come before it, its own "
            "arguments after it."
        )
    if config is not None:
        load_metrics_config(config)
        os.environ[CONFIG_VARIABLE] = str(config.resolve())
    for name in patches:
        importlib.import_module(PATCH_MODULES[name]).apply()
    sys.argv = [script, *args]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")
