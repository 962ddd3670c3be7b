"""Run a function on N real gloo processes. Starting two takes about two seconds: group cases."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 180
# Gloo's workers drop the tensors of a collective a moment after it. An interpreter (3.11) that ends
# in that moment ends the worker inside a destructor, which aborts the process: 23 of 84 torchruns
# of init_process_group and all_gather_object did, on two busy cores, and none of 62 that waited.
SECONDS_FOR_WORKERS = 0.1


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`fn(*args)` on `world_size` gloo ranks; their results, by rank.

    fn: a module-level function. The first exception of a rank is raised here, with its trace;
    ranks that hang are ended after TIMEOUT_SECONDS.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank, (fn, world_size, folder, args), world_size, join=False, start_method="spawn"
        )
        try:
            _join(context)
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        failed = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if failed:
            raise AssertionError(f"rank {failed[0].stem} failed:\n{failed[0].read_text()}")
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world_size)]


def _join(context: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not context.join(timeout=max(deadline - time.monotonic(), 0)):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"the ranks did not end within {TIMEOUT_SECONDS} s")
    except mp.ProcessExitedException:
        pass  # a rank that failed has left its trace in the folder


def _rank(
    rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS // 2),
    )
    # A rank that ends while another still connects makes that one fail.
    dist.barrier()
    try:
        torch.save(fn(*args), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()
        time.sleep(SECONDS_FOR_WORKERS)
