"""Run an unmodified training script after applying patches.

What the script sees is what it would see from `python SCRIPT ARGS...` (or `python -m SCRIPT`): its
`sys.argv`, its folder (with -m the current one) first on `sys.path`, `__name__ == "__main__"`;
its exit code, its traceback and the signals it gets are its own. A patch is applied
when the script, or a process below it, imports a trainer.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from channel_metrics.cli.children import Run, check_patches
from channel_metrics.data.yaml import CONFIG_VARIABLE, load_metrics_config
from channel_metrics.errors import ConfigError

__all__ = ["run_script"]


def run_script(
    script: str,
    args: Sequence[str],
    patches: Sequence[str],
    config: Path | None = None,
    *,
    as_module: bool = False,
) -> None:
    """Run a script as the main program, with patches in all its processes.

    Args:
        script: the path of the script, or the name of a module.
        args: its arguments.
        patches: names from `PATCHES`. They reach the processes that the script starts, too,
            through the environment.
        config: a YAML file with a `MetricsConfig`, which reaches the same processes.
        as_module: whether `script` is the name of a module, as after `python -m`.

    Raises:
        ConfigError: for an unknown patch or a missing script, before anything runs.
    """
    check_patches(patches)
    if not as_module and not os.path.exists(script):
        raise ConfigError(
            f"the script {script!r} does not exist; options of ours come before it, its own "
            "arguments after it."
        )
    if config is not None:
        load_metrics_config(config)
        os.environ[CONFIG_VARIABLE] = str(config)
    if CONFIG_VARIABLE in os.environ:
        # Processes of the script may have another current folder.
        os.environ[CONFIG_VARIABLE] = os.path.abspath(os.environ[CONFIG_VARIABLE])
    run = Run(patches) if patches else None
    sys.argv = [script, *args]
    try:
        _run_main(script, as_module)
    except BaseException as error:  # SystemExit too; it is raised again
        if run is not None:
            run.has_failed = not (isinstance(error, SystemExit) and error.code in (None, 0))
        raise


def _run_main(script: str, as_module: bool) -> None:
    if as_module:
        sys.path[0] = os.getcwd()
        _check_module(script)
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        # As in Python itself, the folder of a link is that of its target.
        sys.path[0] = os.path.dirname(os.path.realpath(script))
        runpy.run_path(script, run_name="__main__")


def _check_module(name: str) -> None:
    """Raise `ConfigError` for a module that cannot be run; its parents are imported."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        found = importlib.util.find_spec(".".join(parts[:end]))
        if found is None or (end < len(parts) and found.submodule_search_locations is None):
            raise ConfigError(
                f"the module {name!r} does not exist; it is looked for as `python -m {name}` "
                "would, from the current folder on."
            )
    package = found is not None and found.submodule_search_locations is not None
    if package and importlib.util.find_spec(f"{name}.__main__") is None:
        raise ConfigError(
            f"{name!r} is a package without a __main__ module; name the module in it that is to "
            "run."
        )
