"""What each rank of a run does, forked by `fork_server`, and what it needs imported before.

What a rank was asked to observe goes to `FOLDER/rank<r>.json`.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from fork_server import Job, attribute


def rank_main(job: Job, rank: int) -> int:
    atexit._clear()  # the server's; the script's own are run below
    observers = {name: attribute(name)() for name in job["observe"]}
    try:
        code = call(partial(start, job["script"], job["args"], job["channel_metrics"]))
        code = call(atexit._run_exitfuncs) or code
        flush_tensorboard()
    finally:
        seen = {name: result() for name, result in observers.items()}
        Path(job["folder"], f"rank{rank}.json").write_text(json.dumps(seen))
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
    # Only megatron.training has a writer of its own.
    global_vars = sys.modules.get("megatron.training.global_vars")
    if global_vars is not None and global_vars._GLOBAL_TENSORBOARD_WRITER is not None:
        global_vars._GLOBAL_TENSORBOARD_WRITER.flush()


def call(main: Any) -> int:
    """The exit code that the interpreter would give if `main` were the program."""
    try:
        main()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:  # whatever ends the script is printed, as Python does
        traceback.print_exc()
        return 1
    return 0


def prepare() -> None:
    """Import the CPU stand-ins and Megatron."""
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
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose {len(threads) - 1} threads"
