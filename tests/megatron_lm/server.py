"""One process that imports torch, the CPU stand-ins and Megatron once, and forks every rank.

    python -m megatron_lm.server LOG

Reads one job (JSON) a line from standard input and answers with one line on standard output; ends
with its input. What a rank prints goes to `FOLDER/rank<r>.out` and `.err`, what it was asked to
observe to `FOLDER/rank<r>.json`.

No rank outlives its job: one that hangs has its tracebacks written to `.err`, then it is killed
with all that it started.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

# Ranks that see another one fail end by themselves, with their own message, within this time.
GRACE_SECONDS = 5.0
# What a rank has to write its tracebacks before it is killed.
DUMP_SECONDS = 1.0
POLL_SECONDS = 0.01


def serve(answers: Any) -> None:
    for line in iter(sys.stdin.readline, ""):
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The exit codes of all ranks, which of them had to be killed, the order of their ends."""
    started = time.monotonic()
    store, port = fork_store()
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
                raise EOFError("the launcher ended, or sent a job during a job")
    finally:
        for pid in (*pids, store):
            kill(pid)
    return {
        "codes": [codes[rank] for rank in range(job["ranks"])],
        "ended": list(codes),
        "killed": killed,
        "seconds": time.monotonic() - started,
    }


def dump_and_kill(pids: Any) -> None:
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


def fork(main: Any, *args: Any) -> int:
    """The id of a child that runs `main` and ends."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            code = main(*args)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
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


def rank_main(job: dict[str, Any], rank: int, port: int) -> int:
    folder = Path(job["folder"])
    redirect(folder / f"rank{rank}")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    atexit._clear()  # the server's; the script's own are run below
    size = job["ranks"]
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    meet = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    os.environ.update({k: str(v) for k, v in (names | meet | job["environ"]).items()})
    os.chdir(folder)
    observers = {name: attribute(name)() for name in job["observe"]}
    try:
        code = call(partial(start, job["script"], job["args"], job["channel_metrics"]))
        code = call(atexit._run_exitfuncs) or code
        flush_tensorboard()
    finally:
        seen = {name: result() for name, result in observers.items()}
        (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    return code


def start(script: str, args: list[str], channel_metrics: list[str] | None) -> None:
    """What `python SCRIPT ARGS` does, or `channel-metrics run OPTIONS SCRIPT ARGS`."""
    if channel_metrics is not None:
        from channel_metrics.cli.main import main

        sys.argv = ["channel-metrics", "run", *channel_metrics, script, *args]
        return main()
    sys.argv = [script, *args]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def flush_tensorboard() -> None:
    """As the end of an interpreter flushes open files; a forked process ends without that."""
    from megatron.training import global_vars

    if global_vars._GLOBAL_TENSORBOARD_WRITER is not None:
        global_vars._GLOBAL_TENSORBOARD_WRITER.flush()


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


def call(main: Any) -> int:
    """The exit code that the interpreter would give if `main` were the program."""
    try:
        main()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def prepare() -> None:
    from megatron_lm import cpu, cpu_layers

    cpu.install()
    # What a script imports anyway; nothing here may start a thread.
    for name in (
        "megatron.training",
        "megatron.training.training",
        "megatron.training.datasets.sft_dataset",
        "megatron.core.models.gpt.gpt_layer_specs",
        "torch.utils.tensorboard",
        "datasets",
        "transformers.models.auto.tokenization_auto",
        "sentencepiece",
        "tiktoken",
        "channel_metrics.cli.main",
    ):
        importlib.import_module(name)
    cpu.install_megatron()
    cpu_layers.install()
    gc.collect()
    gc.freeze()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose {len(threads) - 1} threads"


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    redirect(Path(sys.argv[1]))
    started = time.monotonic()
    prepare()
    answers.write(json.dumps({"seconds": time.monotonic() - started}) + "\n")
    answers.flush()
    serve(answers)
