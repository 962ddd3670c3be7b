"""One process that imports what is slow to import, once, and forks the ranks of every job.

    python -m fork_server LOG NAME...

Each NAME is a module to import, or `module:function` to call, before the first job. The server
reads one job (JSON) a line from standard input and answers with one line on standard output. It
ends with its input. `fork_client` is the other end.

A job:

| key | meaning |
|---|---|
| `ranks` | how many processes |
| `main` | `module:function`; a rank calls it with the job and its own number; its exit code |
| `imports` | modules, or paths of files, to import before the fork; they stay for later jobs |
| `folder` | where each rank starts; what it prints goes to `rank<r>.out` and `.err` there |
| `environ` | the environment of every rank, beside the server's |
| `meet` | whether ranks have the variables of torchrun, and a store at which they meet |
| `timeout` | seconds after which ranks are ended |

No rank outlives its job. A rank that hangs writes its tracebacks to `.err`; then it is killed with
all that it has started.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Ranks that see another one fail end by themselves, with their own message, within this time.
GRACE_SECONDS = 5.0
# What a rank has to write its tracebacks before it is killed.
DUMP_SECONDS = 1.0
POLL_SECONDS = 0.01

Job = dict[str, Any]


def serve(answers: Any) -> None:
    for line in iter(sys.stdin.readline, ""):
        answer(answers, run(json.loads(line)))


def answer(answers: Any, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def run(job: Job) -> dict[str, Any]:
    """The exit codes of all ranks, which of them had to be killed, the order of their ends.

    `failure` in place of these is the trace of an import that failed.
    """
    try:
        prepare(job["imports"])
    except BaseException:  # whatever an import raises is the answer
        return {"failure": traceback.format_exc()}
    started = time.monotonic()
    store, port = fork_store() if job["meet"] else (None, 0)
    pids = {fork(rank_main, job, rank, port): rank for rank in range(job["ranks"])}
    codes: dict[int, int] = {}
    killed: list[int] = []
    deadline = started + job["timeout"]
    try:
        while len(codes) < len(pids):
            for pid in [pid for pid, rank in pids.items() if rank not in codes]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pids[pid]] = os.waitstatus_to_exitcode(status)
                    if codes[pids[pid]]:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline and not killed:
                killed = [rank for rank in pids.values() if rank not in codes]
                dump_and_kill(pid for pid, rank in pids.items() if rank in killed)
            if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
                raise EOFError("the client ended, or sent a job during a job")
    finally:
        for pid in (*pids, *([store] if store else [])):
            kill(pid)
    return {
        "codes": [codes[rank] for rank in range(job["ranks"])],
        "ended": list(codes),
        "killed": killed,
        "seconds": time.monotonic() - started,
    }


def dump_and_kill(pids: Iterable[int]) -> None:
    chosen = list(pids)
    for pid in chosen:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(DUMP_SECONDS)
    for pid in chosen:
        kill(pid)


def kill(pid: int) -> None:
    """End a process and whatever it started: each has a process group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def fork(main: Callable[..., int], *args: Any) -> int:
    """The id of a child that runs `main` and ends."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            code = main(*args)
        except BaseException:  # a child must not run on in the server's code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # Some frameworks leave threads and groups that hang or warn at a regular exit.
            os._exit(code & 0xFF)
    # In both processes, so that nobody is early.
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)
    return pid


def fork_store() -> tuple[int, int]:
    """A process with the store at which the ranks meet, as torchrun has one; its id and port.

    The port is the system's choice, so that runs side by side cannot take each other's.
    """
    read, write = os.pipe()
    pid = fork(store_main, write)
    os.close(write)
    port = os.read(read, 16)
    os.close(read)
    return pid, int(port)


def store_main(write: int) -> int:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(write, str(store.port).encode())
    signal.pause()
    return 0


def rank_main(job: Job, rank: int, port: int) -> int:
    folder = Path(job["folder"])
    redirect(folder / f"rank{rank}")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    environ = torchrun_environ(rank, job["ranks"], port) if job["meet"] else {}
    os.environ.update({key: str(value) for key, value in (environ | job["environ"]).items()})
    os.chdir(folder)
    code: int = attribute(job["main"])(job, rank)
    return code


def torchrun_environ(rank: int, size: int, port: int) -> dict[str, Any]:
    return {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "GLOO_SOCKET_IFNAME": "lo",
    }


def attribute(name: str) -> Any:
    """The object behind `module:name`."""
    module, _, member = name.partition(":")
    return getattr(importlib.import_module(module), member)


def redirect(prefix: Path) -> None:
    """Let standard output and error, also of C++, go to files."""
    for descriptor, name in ((1, f"{prefix}.out"), (2, f"{prefix}.err")):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)


def prepare(names: list[str]) -> None:
    """Import modules or files, call functions."""
    # Imports leave little garbage. To look for it takes a fifth of their time.
    gc.disable()
    for name in names:
        if name.endswith(".py"):
            import_file(Path(name))
        elif ":" in name:
            attribute(name)()
        else:
            importlib.import_module(name)
    import_deepspeed()
    # What the imports made stays: no collection in a rank needs to look at it.
    gc.collect()
    gc.freeze()
    gc.enable()


def import_deepspeed() -> None:
    """If it is installed, accelerate imports it in the first training, which takes seconds."""
    if "accelerate" in sys.modules and importlib.util.find_spec("deepspeed") is not None:
        importlib.import_module("deepspeed")


def import_file(path: Path) -> None:
    """As pytest imports a test file: what lies beside it can be imported by its bare name."""
    if path.stem not in sys.modules:
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:  # it is raised again
            del sys.modules[path.stem]
            raise


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "w")
    redirect(Path(sys.argv[1]))
    begun = time.monotonic()
    prepare(sys.argv[2:])
    answer(output, {"seconds": time.monotonic() - begun})
    serve(output)
