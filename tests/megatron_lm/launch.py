"""Runs Megatron on the CPU and reads what it left.

    run = launcher.run("tp2", *data.blend())
    run.steps[1]["lm loss"]                        # the printed line of iteration 1
    run.scalars["lm loss"][1]                      # TensorBoard
    run = launcher.run("tp2", *data.blend(), "--channels", patch=True, observe=(observe.weights,))
    run.ranks[0].seen["weights"]

The same run asked for twice happens once. The first run imports Megatron, which takes some ten
seconds; each further one a few.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from fork_client import Preload
from rank_cases import RanksOf

from megatron_lm.layouts import BASE, LAYOUTS, Layout
from megatron_lm.logs import Line, parse_lines, read_scalars

RUN_SECONDS = 90


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


needs_megatron_training = pytest.mark.skipif(
    not has_module("megatron.training"),
    reason="megatron.training is only in the latest environment, which `make test-latest` runs",
)


def checkout() -> tuple[str, ...]:
    """The checkout of Megatron-LM in MEGATRON_LM_PATH, if there is one."""
    given = os.environ.get("MEGATRON_LM_PATH")
    return (given,) if given else ()


def default_script() -> Path:
    """The script of the tests, or that of the checkout."""
    for folder in checkout():
        return Path(folder).resolve() / "pretrain_gpt.py"
    return Path(__file__).with_name("pretrain_tiny.py")


@dataclass(frozen=True)
class Rank:
    """What one process left."""

    code: int
    killed: bool
    """It had not ended in time, or not soon after another rank failed."""

    out: str
    err: str
    seen: dict[str, Any]
    """By observer."""

    @property
    def said(self) -> str:
        """Both streams: Megatron sets up logging, which otherwise goes to the second."""
        return self.out + self.err

    @cached_property
    def lines(self) -> list[Line]:
        return parse_lines(self.out)


@dataclass(frozen=True)
class Run:
    folder: Path
    seconds: float
    ranks: list[Rank]
    ended: list[int]
    """Ranks in the order in which they ended."""

    @property
    def lines(self) -> list[Line]:
        """What the last rank printed, which is the one that prints losses."""
        return self.ranks[-1].lines

    @property
    def steps(self) -> dict[int, dict[str, float]]:
        """Per iteration: the numbers of all lines that begin with `iteration`."""
        found: dict[int, dict[str, float]] = {}
        for line in self.lines:
            if line.head.startswith("iteration"):
                found.setdefault(line.iteration, {}).update(line.values)
        return found

    @cached_property
    def scalars(self) -> dict[str, dict[int, float]]:
        """TensorBoard: tag, then step, to value."""
        return read_scalars(self.folder / "tensorboard")

    @property
    def failure(self) -> str:
        """The traces of the ranks that failed, in the order of their ends; empty if none did."""
        failed = [(r, self.ranks[r]) for r in self.ended if self.ranks[r].code]
        return "\n".join(
            f"--- rank {r}: exit code {rank.code}{', killed' * rank.killed}, {self.folder}\n"
            f"{rank.out[-500:]}\n{rank.err[-4000:]}"
            for r, rank in failed
        )


class Launcher:
    """Runs in one folder."""

    preload = Preload(("megatron_lm.script:prepare",), first=checkout())

    def __init__(self, folder: Path, ranks_of: RanksOf) -> None:
        self.folder, self.ranks_of = folder, ranks_of
        self.done: dict[str, Run] = {}

    def run(
        self,
        layout: str | Layout,
        *args: str,
        patch: bool | tuple[str, ...] = False,
        observe: tuple[Callable[[], Any], ...] = (),
        script: Path | None = None,
        environ: dict[str, str] | None = None,
        timeout: float = RUN_SECONDS,
        check: bool = True,
    ) -> Run:
        """Train with the arguments of `BASE`, then the layout's, then `args`.

        layout: a name in `LAYOUTS`, or one of the test's own.
        patch: start by `channel-metrics run --patch megatron`; with a tuple, by
            `channel-metrics run` and these options.
        observe: functions as in `observe`; what they saw is in `Rank.seen`, by their names.
        script: in place of `default_script()`.
        check: a rank that fails raises AssertionError with its trace.
        """
        chosen = LAYOUTS[layout] if isinstance(layout, str) else layout
        options = ["--patch", "megatron"] if patch is True else list(patch or ())
        job = {
            "ranks": chosen.ranks,
            "script": str(script or default_script()),
            "args": [*BASE, *chosen.args, *args],
            "channel_metrics": options if patch is not False else None,
            "observe": [f"{watch.__module__}:{watch.__qualname__}" for watch in observe],
            "environ": environ or {},
            "timeout": timeout,
        }
        return self._once(job, check)

    @property
    def next_folder(self) -> Path:
        """Where the next run will be."""
        return self.folder / f"run{len(list(self.folder.glob('run*')))}"

    def _once(self, job: dict[str, Any], check: bool) -> Run:
        key = json.dumps(job)
        if key not in self.done:
            self.done[key] = self._run(job)
        run = self.done[key]
        if check and run.failure:
            raise AssertionError(run.failure)
        return run

    def _run(self, job: dict[str, Any]) -> Run:
        folder = self.next_folder
        folder.mkdir()
        places = ["--tensorboard-dir", str(folder / "tensorboard")]
        places += ["--data-cache-path", str(self.folder / "cache")]
        job = {**job, "folder": folder, "args": [*job["args"], *places]}
        answer = self.ranks_of.server(self.preload).ask(main="megatron_lm.script:rank_main", **job)
        ranks = []
        for index, code in enumerate(answer["codes"]):
            out, err = ((folder / f"rank{index}.{end}").read_text() for end in ("out", "err"))
            path = folder / f"rank{index}.json"
            seen = json.loads(path.read_text()) if path.exists() else {}
            short = {name.rpartition(":")[2]: value for name, value in seen.items()}
            ranks.append(Rank(code, index in answer["killed"], out, err, short))
        return Run(folder, answer["seconds"], ranks, answer["ended"])
