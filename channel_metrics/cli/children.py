"""Carries patches into all processes of a run, and says so if they were of no use.

Python processes that the script starts, and those below them, inherit the environment: PYTHONPATH
with `channel_metrics/startup`, the names of the patches, and a folder for `run_marks`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from channel_metrics.errors import ConfigError
from channel_metrics.run_marks import RUN_VARIABLE
from channel_metrics.startup import sitecustomize
from channel_metrics.startup.sitecustomize import PATCHES, PATCHES_VARIABLE

__all__ = ["Run", "check_patches", "missed"]


def check_patches(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that is none of `PATCHES`."""
    for name in names:
        if name not in PATCHES:
            raise ConfigError(f"unknown patch {name!r}; there are {', '.join(PATCHES)}.")


class Run:
    """A run with patches, in this process and in those below it.

    Args:
        patches: names from `PATCHES`.

    A run inside another one belongs to that: it adds its patches, and leaves the last line to it.
    """

    def __init__(self, patches: Sequence[str]) -> None:
        self.has_failed = False
        outer = [name for name in os.environ.get(PATCHES_VARIABLE, "").split(",") if name]
        self.patches = list(dict.fromkeys([*outer, *patches]))
        self._is_main_rank = os.environ.get("RANK", "0") == "0"
        self._process = os.getpid()
        os.environ[PATCHES_VARIABLE] = ",".join(self.patches)
        _put_on_python_path(Path(sitecustomize.__file__).parent)
        if not os.path.isdir(os.environ.get(RUN_VARIABLE, "")):
            self._folder = os.environ[RUN_VARIABLE] = tempfile.mkdtemp(prefix="channel_metrics-")
            # Registered first, so it is called last: after those of the script, which wait for
            # its processes.
            atexit.register(self._end)
        sitecustomize.finder.watch(patches)

    def _end(self) -> None:
        if os.getpid() != self._process:
            return  # A process that the script has forked, without exec.
        marks = set(os.listdir(self._folder)) if os.path.isdir(self._folder) else set()
        shutil.rmtree(self._folder, ignore_errors=True)
        line = missed(self.patches, marks)
        # After a failure, the last line is that of the script.
        if line and self._is_main_rank and not self.has_failed:
            print(f"channel metrics: {line}", file=sys.stderr)


def missed(patches: Sequence[str], marks: set[str]) -> str | None:
    """Say what was missing in a run that logged no channel.

    Args:
        patches: the names of its patches.
        marks: what its processes have marked, see `run_marks`.

    Returns:
        One line, or None if a channel was logged.
    """
    if "channel" in marks:
        return None
    if "session" in marks:
        return (
            "no channel was logged. Either no record names one (`channel-metrics check` shows the "
            "channels of a file), or the run ended before its first log."
        )
    if "patched" in marks:
        needs = " Megatron's loop needs the option --channels." if "megatron" in patches else ""
        return (
            f"no channel was logged, because no trainer that --patch {' '.join(patches)} knows "
            f"was made.{needs}"
        )
    modules = sorted({module for name in patches for module in PATCHES.get(name, {})})
    return (
        f"no channel was logged, because no process of this run imported {' or '.join(modules)}, "
        f"which --patch {' '.join(patches)} waits for. Processes with `python -I`, `-E` or `-S`, "
        "with another PYTHONPATH or on other machines are not reached."
    )


def _put_on_python_path(folder: Path) -> None:
    given = os.environ.get("PYTHONPATH")
    others = [e for e in given.split(os.pathsep) if e != str(folder)] if given else []
    # First, even if it is there: a `sitecustomize` before it would be imported in place of ours.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *others])
