"""Run an unmodified training script after applying patches.

The script runs as with `python SCRIPT ARGS...`: it has its own `sys.argv`, its folder is first on
`sys.path`, and `__name__` is "__main__". Its exit code, tracebacks and signals are unchanged.
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


# {name that `--patch` takes: the module whose `apply` is called}
PATCH_MODULES = {
    "hf_trainer": "channel_metrics.trainers.hf.patch",
    "megatron": "channel_metrics.trainers.megatron.patch",
    "ms_swift": "channel_metrics.trainers.swift.patch",
    "trl": "channel_metrics.trainers.trl.patch",
}


def run_script(
    script: str, args: Sequence[str], patches: Sequence[str], config: Path | None = None
) -> None:
    """Apply patches, then run a script as the main program.

    Args:
        script: the path of the script.
        args: its arguments.
        patches: names from `PATCH_MODULES`, in this order.
        config: a YAML file with a `MetricsConfig`. Processes that the script starts get it, too,
            through the environment.

    Raises:
        ConfigError: for an unknown patch or a missing script, before anything runs.
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
