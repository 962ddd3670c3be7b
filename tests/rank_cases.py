"""Functions that a test runs on several real processes, and that stand beside it.

    @case(HF, ranks=2)
    def averaged(folder: Path) -> Any:
        return ...  # plain values, by each rank

    def test_average(ranks_of: RanksOf) -> None:
        first, second = ranks_of(averaged)

Starting ranks takes seconds. The cases of a file that agree in all that `case` is given are a
group: when a test asks for one of them, all run, one after the other, in the same processes.
What needs arguments is no case: `ranks_of.call(HF, function, 1, ranks=2, folder=tmp_path)`.
"""

from __future__ import annotations

import importlib
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fork_client import Preload, Server, begin
from fork_server import Job, attribute

# The library alone.
TORCH = Preload(("channel_metrics",))
TIMEOUT_SECONDS = 60
GROUP_SECONDS = 240


@dataclass(frozen=True)
class Case:
    """A function that runs on ranks; see `case`."""

    function: Callable[[Path], Any]
    preload: Preload
    ranks: int
    setup: str | None

    @property
    def __name__(self) -> str:
        """pytest shows it as the name of a parameter."""
        return self.function.__name__

    @property
    def group(self) -> tuple[Any, ...]:
        return self.function.__module__, self.preload, self.ranks, self.setup


def case(preload: Preload, *, ranks: int, setup: str | None = None) -> Callable[..., Case]:
    """Register a function as a case.

    The function is given a folder of its own, which does not exist yet, and returns what can be
    pickled.

    Args:
        preload: the server that forks the ranks.
        ranks: how many there are. One alone has no process group, and knows of no torchrun.
        setup: `module:function`, called on each rank before the first case of a group. The module
            is imported before the fork.
    """
    return lambda function: Case(function, preload, ranks, setup)


class RanksOf:
    """`ranks_of(case)`: what the case returned, by rank; its failure is raised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[tuple[Any, ...], Path] = {}
        self._server: Server | None = None
        self._servers = 0

    def __call__(self, of: Case) -> list[Any]:
        if of.group not in self._done:
            # Also when it fails: the next test must not run it again.
            self._done[of.group] = self.folder / f"group{len(self._done)}"
            self._run(of)
        output = self._done[of.group]
        paths = [output / f"{of.__name__}.{rank}" for rank in range(of.ranks)]
        results = [pickle.loads(path.read_bytes()) for path in paths if path.exists()]
        errors = [result["error"] for result in results if "error" in result]
        if errors or len(results) < of.ranks:
            said = [path.read_text()[-3000:] for path in sorted(output.glob("rank*.err"))]
            raise AssertionError("\n".join([*errors, f"case {of.__name__} in {output}:", *said]))
        return [result["value"] for result in results]

    def call(
        self, preload: Preload, function: Callable[..., Any], *args: Any, **options: Any
    ) -> list[Any]:
        """`Server.call` of the server with this preload."""
        return self.server(preload).call(function, *args, **options)

    def server(self, preload: Preload) -> Server:
        """One server at a time: each holds much memory."""
        if self._server is None or self._server.preload != preload:
            self.close()
            folder = self.folder / f"server{self._servers}"
            self._servers += 1
            folder.mkdir()
            self._server = Server(preload, folder)
        return self._server

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def _run(self, of: Case) -> None:
        module = sys.modules[of.function.__module__]
        group = [c for c in vars(module).values() if isinstance(c, Case) and c.group == of.group]
        output = self._done[of.group]
        output.mkdir()
        # The cases of a file may read what an earlier one wrote.
        folder = self.folder / module.__name__
        folder.mkdir(exist_ok=True)
        self.server(of.preload).ask(
            output,
            "rank_cases:run_group",
            ranks=of.ranks,
            timeout=GROUP_SECONDS,
            meet=of.ranks > 1,
            imports=[*([of.setup.partition(":")[0]] if of.setup else []), str(module.__file__)],
            module=module.__name__,
            cases=[c.__name__ for c in group],
            setup=of.setup,
            cases_folder=str(folder),
        )


def run_group(job: Job, rank: int) -> int:
    """On a rank: run the cases, and write `<case>.<rank>` for each."""
    if job["setup"]:
        attribute(job["setup"])()
    begin(job, TIMEOUT_SECONDS)
    module = importlib.import_module(job["module"])
    for name in job["cases"]:
        try:
            found = {"value": getattr(module, name).function(Path(job["cases_folder"], name))}
            content = pickle.dumps(found)
        except BaseException:  # also SystemExit: the test shows what ended the rank
            found = {"error": traceback.format_exc()}
            content = pickle.dumps(found)
        Path(job["folder"], f"{name}.{rank}").write_bytes(content)
        if "error" in found:
            # The ranks are out of step now; the server ends the others.
            return 1
    return 0
