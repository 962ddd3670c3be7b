"""The server of `megatron_lm.server`, with ms-swift's Megatron side imported on the CPU.

python swift_megatron_server.py LOG
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path

import swift_megatron_cpu
from megatron_lm import server

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


def prepare() -> None:
    swift_megatron_cpu.install()
    for name in NAMES:
        importlib.import_module(name)
    # Only megatron.training has a writer of its own, which is not in this environment.
    server.flush_tensorboard = lambda: None
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    server.redirect(Path(sys.argv[1]))
    started = time.monotonic()
    prepare()
    answers.write(json.dumps({"seconds": time.monotonic() - started}) + "\n")
    answers.flush()
    server.serve(answers)
