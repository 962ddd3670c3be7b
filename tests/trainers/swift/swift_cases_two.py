"""Cases of ms-swift on two ranks: DDP, dispatched streams, DeepSpeed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import swift_tools
from hf_case_tools import cases_of
from swift_files import ranks_given

WORLD_SIZE = 2
ENVIRON: dict[str, str] = {}

# Shared memory collectives are compiled at first use; without them DeepSpeed takes gloo.
importlib.import_module("deepspeed")
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

# ms-swift chooses fp16 for float32, which DeepSpeed has not for a CPU.
EXACT = {"fp16": False, "bf16": False}
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}


def ddp(folder: Path) -> Any:
    """And what ms-swift sends without its flag."""
    plain = swift_tools.run(ranks_given(folder, enable_channel_loss=False), None)
    return swift_tools.both(ranks_given(folder)) | {"plain": plain["collectives"]}


def uneven_evaluation(folder: Path) -> Any:
    """13 records on two ranks: one is evaluated twice."""
    given = {"eval_strategy": "steps", "eval_on_start": True, "max_steps": 1}
    validation = f"{ranks_given(folder)['dataset'][0]}#13"
    batch = {"per_device_eval_batch_size": 4, "val_dataset": [validation]}
    return swift_tools.both(ranks_given(folder, **given, **batch))


def stream(folder: Path) -> Any:
    """The first rank makes the batches of both."""
    return swift_tools.both(ranks_given(folder, "fused", streaming=True))


def zero2(folder: Path) -> Any:
    return swift_tools.both(ranks_given(folder, deepspeed=ZERO_2, **EXACT))


def zero2_lora(folder: Path) -> Any:
    given = {"tuner_type": "lora", "lora_rank": 2, "target_modules": ["all-linear"]}
    return swift_tools.both(ranks_given(folder, deepspeed=ZERO_2, **EXACT, **given))


CASES = cases_of(globals())
