"""All runs of ms-swift's Megatron trainer that the tests look at, made once, by one server."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from fork_client import Preload
from megatron_lm.launch import Launcher, Run
from paths import PATCHES
from swift_files import make_data, make_model
from swift_megatron_cases import RUNS, Case

FOLDER = Path(__file__).parent
RUN_SECONDS = 60
OWN = ("logs", "end", "tokens", "used")
# What a run imports on its way.
NAMES = (
    "swift.megatron.pipelines",
    "swift.megatron.arguments",
    "swift.megatron.trainers",
    "swift.pipelines",
    "swift.trainers",
    "megatron.core.dist_checkpointing",
    "megatron.core.transformer.experimental_attention_variant.dsa",
    "matplotlib.pyplot",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.utils.tensorboard",
    "transformers.models.qwen2",
    "channel_metrics.trainers.swift_megatron",
)
OBSERVERS = ["megatron_lm.observe:collectives", *(f"swift_megatron_observe:{o}" for o in OWN)]


class Server(Launcher):
    """The launcher of `megatron_lm`, for runs of ms-swift."""

    preload = Preload(("swift_megatron_cpu:install", *NAMES))

    def train(self, case: Case) -> Run:
        plugin = PATCHES / "ms_swift.py"
        folder = self.folder / f"run{len(self.done)}"
        if "resumable" in self.done:
            self.files["checkpoint"] = self.done["resumable"].folder / "out" / "checkpoint-2"
        given = case.arguments(self.files) | {"output_dir": str(folder / "out")}
        environ = {}
        if case.metrics is not None:
            given["external_plugins"] = [str(plugin)]
            path = self.folder / f"{case.name}.yaml"
            path.write_text(json.dumps(case.metrics))  # JSON is YAML
            environ["CHANNEL_METRICS_CONFIG"] = str(path)
        run = self._run(
            {
                "ranks": case.ranks,
                "script": str(FOLDER / case.script),
                "args": [json.dumps(given)],
                "channel_metrics": None,
                "observe": case.observers(OBSERVERS),
                "environ": environ,
                "timeout": RUN_SECONDS,
            }
        )
        self.done[case.name] = run
        return run

    @cached_property
    def files(self) -> dict[str, Path]:
        """The model and the data of all runs."""
        sizes = {"num_hidden_layers": 4, "vocab_size": 512, "attention_dropout": 0.0}
        model = make_model(self.folder / "model", **sizes)
        return {"model": model, "folder": self.folder, **make_data(self.folder)}


class Results:
    """What the ranks of each run left, by the name of its case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ranks(self, name: str) -> list[dict[str, Any]]:
        """{observer: what it saw} per rank; a rank that failed is raised here."""
        ranks: list[dict[str, Any]] = self._found(name)["ranks"]
        return ranks

    def logs(self, name: str) -> list[dict[str, Any]]:
        """What was logged, by the rank that writes."""
        logs: list[dict[str, Any]] = self.ranks(name)[-1]["logs"]
        return logs

    def printed(self, name: str, stream: str = "out") -> list[str]:
        """What each rank wrote to standard output, or (`err`) to standard error."""
        texts: list[str] = self._found(name)[stream]
        return texts

    def _found(self, name: str) -> Any:
        found = json.loads((self.folder / f"{name}.json").read_text())
        if found["failure"]:
            raise AssertionError(found["failure"])
        return found


def launch(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of all runs; the first test that asks makes them, and the others wait."""
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have a folder each, side by side.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "swift_megatron"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "seconds").exists():
            _run_all(shared)
    return Results(shared)


def _run_all(folder: Path) -> None:
    server = Server(folder)
    seconds = {"start": time.monotonic()}
    try:
        for case in RUNS:
            seconds[case.name] = _keep(server, case, folder)
        _repeat_until_equal(server, "packed_vpp2", folder)
    finally:
        server.close()
        seconds["start"] = time.monotonic() - seconds["start"]
        (folder / "seconds").write_text(json.dumps(seconds, indent=1))


def _keep(server: Server, case: Case, folder: Path, name: str | None = None) -> float:
    """Run `case`, and keep what it left under `name`, by default its own."""
    run = server.train(case)
    result = {
        "failure": run.failure,
        "out": [rank.out for rank in run.ranks],
        "err": [rank.err for rank in run.ranks],
        "ranks": [rank.seen for rank in run.ranks],
    }
    (folder / f"{name or case.name}.json").write_text(json.dumps(result))
    return run.seconds


def _repeat_until_equal(server: Server, name: str, folder: Path) -> None:
    """Run both cases of `name` again, at most twice, if they end in other weights.

    Megatron's virtual pipeline is not the same each time over gloo: of 24 runs without metrics on
    a busy machine one ended in other weights. Metrics that changed the training would do so always.
    """
    cases = {case.name: case for case in RUNS}
    pair, results = [f"{name}_off", f"{name}_on"], Results(folder)
    for attempt in range(2):
        off, on = ([rank.get("end") for rank in results._found(n)["ranks"]] for n in pair)
        if off == on:
            return
        for case_name in pair:
            again = replace(cases[case_name], name=f"{case_name}_again{attempt}")
            _keep(server, again, folder, case_name)
