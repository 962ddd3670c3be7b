"""Runs cases on several real gloo processes and leaves their results as JSON.

    python hf_worker.py FOLDER GROUP...

A group is a module with a list of cases that share the processes; a case is a function that
returns plain values. Every rank writes `FOLDER/<case>.<rank>.json`. The expensive imports happen
once, in the parent: ranks are forked, and so start in no time.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 60
HANG_SECONDS = 150

Case = Callable[[Path], Any]


def _rank(module: str, rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    group = importlib.import_module(module)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": group.WORLD_SIZE}
    local = {"LOCAL_WORLD_SIZE": group.WORLD_SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    environ = names | local if group.WORLD_SIZE > 1 else {}
    os.environ.update({key: str(value) for key, value in (environ | group.ENVIRON).items()})
    torch.set_num_threads(1)
    # What the imports made stays: the collections that frameworks ask for need not look at it.
    gc.freeze()
    if group.WORLD_SIZE > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{module}.{os.getppid()}.store",
            rank=rank,
            world_size=group.WORLD_SIZE,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
    for case in group.CASES:
        # A rank that hangs says where.
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        started = time.monotonic()
        try:
            value: Any = {"value": case(folder / case.__name__)}
        except BaseException:
            value = {"error": traceback.format_exc()}
        value["seconds"] = time.monotonic() - started
        (folder / f"{case.__name__}.{rank}.json").write_text(json.dumps(value))
        if "error" in value:
            # The ranks are out of step now; the parent ends the others.
            os._exit(1)
    for child in active_children():
        child.terminate()
    # Some frameworks leave threads and groups that hang or warn at a regular exit.
    os._exit(0)


def _run(module: str, folder: Path) -> None:
    context = get_context("fork")
    world_size = importlib.import_module(module).WORLD_SIZE
    ranks = [context.Process(target=_rank, args=(module, r, folder)) for r in range(world_size)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode not in (None, 0) for process in ranks):
            time.sleep(2)
            for process in ranks:
                process.kill()
        time.sleep(0.02)
    for process in ranks:
        process.join()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    target = Path(sys.argv[1])
    for name in sys.argv[2:]:
        _run(name, target)
