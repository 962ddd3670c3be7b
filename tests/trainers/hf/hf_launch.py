"""One launch of many cases on several processes, shared by all tests that look at them."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import python_path

FOLDER = Path(__file__).parent
# The groups of a launch run one after the other in processes forked from one.
LAUNCHES = {
    "ddp": ("hf_cases_ddp2", "hf_cases_ddp4"),
    "sharded": ("hf_cases_fsdp", "hf_cases_deepspeed"),
    "probe": ("hf_cases_probe", "hf_cases_probe_fsdp", "hf_cases_probe_zero"),
    "swift": ("swift_cases_one", "swift_cases_gaps"),
    "swift_ranks": ("swift_cases_two", "swift_cases_sp"),
    "swift_liger": ("swift_cases_liger",),
}
NEEDS = {"hf_cases_deepspeed": "deepspeed", "hf_cases_probe_zero": "deepspeed"}
TIMEOUT_SECONDS = 240


class Launch:
    """Results of the cases of one launch."""

    def __init__(self, folder: Path, output: str) -> None:
        self.folder = folder
        self.output = output

    def ranks(self, case: str) -> list[Any]:
        """What the case returned, by rank; its failure is raised here."""
        found = sorted(self.folder.glob(f"{case}.*.json"))
        results = [json.loads(path.read_text()) for path in found]
        errors = [result["error"] for result in results if "error" in result]
        if errors or not results:
            raise AssertionError("\n".join([*errors, f"case {case}:", self.output[-3000:]]))
        return [result["value"] for result in results]


def launch(name: str, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """The results of a launch, which the first test that asks starts and the others wait for."""
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have a folder each, side by side.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"launch_{name}"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = shared / "output"
        if not output.exists():
            output.write_text(_start(name, shared))
        return Launch(shared, output.read_text())


def _start(name: str, folder: Path) -> str:
    groups = [g for g in LAUNCHES[name] if g not in NEEDS or importlib.util.find_spec(NEEDS[g])]
    # Nothing may come from an earlier run.
    caches = {name: str(folder / "cache") for name in ("HF_DATASETS_CACHE", "MODELSCOPE_CACHE")}
    try:
        ended = subprocess.run(
            [sys.executable, str(FOLDER / "hf_worker.py"), str(folder), *groups],
            env={**os.environ, **caches, "PYTHONPATH": python_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return f"no end after {TIMEOUT_SECONDS} s: {error.stdout!r}"
    return ended.stdout
