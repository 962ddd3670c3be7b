"""Cases on two ranks of DeepSpeed: ZeRO-1, 2 and 3, and Ulysses sequence parallelism."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from accelerate import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedSequenceParallelConfig
from datasets import Dataset
from hf_case_tools import cases_of, fixed_records, run, told
from hf_tools import PaddingCollator, make_records, tiny_model

from channel_metrics import MetricsConfig

WORLD_SIZE = 2
ENVIRON: dict[str, str] = {}

# Shared memory collectives are compiled at first use; without them DeepSpeed takes gloo.
importlib.import_module("deepspeed")
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

_prepare_backend = PartialState._prepare_backend


def _with_gloo(state: Any, *args: Any, **kwargs: Any) -> Any:
    # accelerate looks for a GPU to choose a backend, and takes one process if there is none.
    backend, kind = _prepare_backend(state, *args, **kwargs)
    return backend or "gloo", kind


PartialState._prepare_backend = _with_gloo

COUNTS = MetricsConfig(metrics=("loss", "tokens", "token_acc", "share"))


def _config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    }


def _zero(folder: Path, stage: int) -> Any:
    trainer = run(
        folder,
        records=make_records(64),
        use_cpu=False,
        ddp_backend=None,
        deepspeed=_config(stage),
        gradient_accumulation_steps=2,
    )
    held_out = Dataset.from_list(make_records(10, seed=1))
    return told(trainer, evaluated=trainer.evaluate(held_out))


def zero1(folder: Path) -> Any:
    return _zero(folder, 1)


def zero2(folder: Path) -> Any:
    return _zero(folder, 2)


def zero3(folder: Path) -> Any:
    return _zero(folder, 3)


def _bits(folder: Path, metrics_on: bool) -> Any:
    return told(
        run(
            folder,
            records=make_records(64),
            metrics_on=metrics_on,
            dropout=0.1,
            learning_rate=1e-2,
            max_steps=6,
            use_cpu=False,
            ddp_backend=None,
            gradient_accumulation_steps=2,
            deepspeed=_config(2),
        )
    )


def zero2_bits_off(folder: Path) -> Any:
    return _bits(folder, False)


def zero2_bits_on(folder: Path) -> Any:
    return _bits(folder, True)


class Positioned(PaddingCollator):
    """Ulysses wants positions, and takes no mask."""

    def __call__(self, features: list[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        rows, width = batch["input_ids"].shape
        del batch["attention_mask"]
        return {**batch, "position_ids": torch.arange(width).repeat(rows, 1)}


def ulysses(folder: Path) -> Any:
    """Both ranks train on halves of the rows, first of the one's batch, then of the other's."""
    sequence = DeepSpeedSequenceParallelConfig(
        sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
    )
    trainer = run(
        folder,
        config=COUNTS,
        records=fixed_records(32),
        collator=Positioned(),
        model=tiny_model(attention_dropout=0.0, num_key_value_heads=2, attn_implementation="sdpa"),
        use_cpu=False,
        ddp_backend=None,
        deepspeed=_config(1),
        parallelism_config=ParallelismConfig(sp_size=2, sp_handler=sequence),
        # DeepSpeed cuts rows as views, and on a CPU nothing makes them contiguous: one row has no
        # such problem.
        per_device_train_batch_size=1,
        max_steps=4,
    )
    held_out = Dataset.from_list(fixed_records(10, seed=1))
    return told(trainer, evaluated=trainer.evaluate(held_out))


CASES = cases_of(globals())
