"""Starts a `fork_server` and sends it jobs.

server = Server(Preload(("torch",)), folder)
first, second = server.call(function, 1, 2, ranks=2, folder=folder / "job")
server.close()
"""

from __future__ import annotations

import json
import os
import pickle
import select
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from fork_server import Job
from paths import python_path

START_SECONDS = 180
CALL_SECONDS = 200
CALL = "call.pickle"
# Beyond the time of a job: what the server needs for imports, and to end the ranks.
SERVER_SECONDS = 60


@dataclass(frozen=True)
class Preload:
    """What a server does before its first job.

    names: modules to import, or `module:function` to call. environ: variables, beside those of
    this process. first: what comes first on its path.
    """

    names: tuple[str, ...]
    environ: tuple[tuple[str, str], ...] = ()
    first: tuple[str, ...] = ()


class Server:
    """One server; it starts with the first job. What it prints itself goes to `folder`."""

    def __init__(self, preload: Preload, folder: Path) -> None:
        self.preload = preload
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def ask(
        self,
        folder: Path,
        main: str,
        *,
        ranks: int,
        timeout: float,
        meet: bool = True,
        imports: Iterable[str] = (),
        environ: dict[str, str] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Run a job; see `fork_server` for what it may say and for the answer.

        more: further entries of the job, which `main` reads.
        """
        job = {
            "folder": str(folder),
            "main": main,
            "ranks": ranks,
            "timeout": timeout,
            "meet": meet,
            "imports": list(imports),
            "environ": environ or {},
            **more,
        }
        try:
            if self.process is None:
                self.process = self._start()
                self._answer(START_SECONDS)
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            return self._answer(timeout + SERVER_SECONDS)
        except BaseException:  # it is raised again
            # Also when pytest interrupts the wait: the next job must not read this one's answer.
            self.close()
            raise

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int,
        folder: Path,
        meet: bool = True,
        imports: Iterable[str] = (),
    ) -> list[Any]:
        """`function(*args)` on each of some ranks that have met over gloo.

        Args:
            function: of a module, or a method of an object that can be pickled.
            args: the same on all ranks; pickled, as is what the function returns.
            folder: where the ranks start; made here.
            meet: without it, a rank is alone and knows of no torchrun.
            imports: modules to import before the fork; they stay for later jobs.

        Returns:
            What the function returned, by rank.

        Raises:
            AssertionError: if a rank fails, with what the ranks printed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CALL).write_bytes(pickle.dumps((function, args)))
        answer = self.ask(
            folder,
            "fork_client:run_call",
            ranks=ranks,
            timeout=CALL_SECONDS,
            meet=meet,
            imports=imports,
        )
        if any(answer["codes"]):
            # The first to end is the cause; others only miss it.
            raise AssertionError(
                "\n".join(
                    f"rank {rank}: {(folder / f'rank{rank}.err').read_text()[-4000:]}"
                    for rank in answer["ended"]
                    if answer["codes"][rank]
                )
            )
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]

    def close(self) -> None:
        """End the server, and with it what it runs."""
        process, self.process = self.process, None
        if process is not None:
            with process:  # closes its input, at which it ends
                try:
                    process.communicate(timeout=SERVER_SECONDS)
                finally:
                    process.kill()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], seconds)[0]
        line = self.process.stdout.readline() if ready else ""
        if not line:
            log = (self.folder / "server.err").read_text()
            raise RuntimeError(f"the server ended or said nothing for {seconds} s: {log[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        if "failure" in answer:
            raise AssertionError(answer["failure"])
        return answer

    def _start(self) -> subprocess.Popen[str]:
        # Nothing may come from an earlier run.
        caches = ("HF_HOME", "HF_DATASETS_CACHE", "MODELSCOPE_CACHE")
        settings = {name: str(self.folder / "cache") for name in caches}
        # No threads before a fork: pyarrow's allocator starts one.
        settings["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
        return subprocess.Popen(
            [sys.executable, "-m", "fork_server", str(self.folder / "server"), *self.preload.names],
            cwd=self.folder,
            env={
                **os.environ,
                **settings,
                **dict(self.preload.environ),
                "PYTHONPATH": python_path(*self.preload.first),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A signal to the tests does not reach it: it ends with its input, and ends its ranks.
            start_new_session=True,
        )


def run_call(job: Job, rank: int) -> int:
    """On a rank: what `Server.call` asks for."""
    begin(job, CALL_SECONDS // 2)
    folder = Path(job["folder"])
    function, args = pickle.loads((folder / CALL).read_bytes())
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(function(*args)))
    return 0


def begin(job: Job, seconds: float) -> None:
    """On a rank: meet the others over gloo, if the job says so."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if job["meet"]:
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
        # A rank that ends while another still connects makes that one fail.
        dist.barrier()
