"""Cases on two ranks of FSDP2, context parallelism and tensor parallelism, through accelerate.

accelerate takes FSDP, and parallelism of other kinds than data, only for devices other than the
CPU: under `use_cpu` it silently trains with DistributedDataParallel. Everything below that
decision runs on the CPU, so the decision is what these cases change.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from hf_case_tools import TP_SIZES, cases_of, fixed_records, run, told
from hf_tools import PaddingCollator, make_records, tiny_model
from torch.distributed.nn.functional import all_gather
from transformers import Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from channel_metrics import MetricsConfig

WORLD_SIZE = 2
ENVIRON: dict[str, str] = {}

FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
}
COUNTS = MetricsConfig(metrics=("loss", "tokens", "token_acc", "share"))

_set_device = PartialState.set_device


def _not_as_cpu(state: Any) -> None:
    _set_device(state)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_XPU


PartialState.set_device = _not_as_cpu


def fsdp2(folder: Path) -> Any:
    trainer = run(folder, records=make_records(64), **FSDP2)
    held_out = Dataset.from_list(make_records(10, seed=1))
    return told(trainer, evaluated=trainer.evaluate(held_out), model=type(trainer.model).__name__)


def _bits(folder: Path, metrics_on: bool) -> Any:
    return told(
        run(
            folder,
            records=make_records(64),
            metrics_on=metrics_on,
            dropout=0.1,
            learning_rate=1e-2,
            max_steps=6,
            gradient_accumulation_steps=2,
            **FSDP2,
        )
    )


def fsdp2_bits_off(folder: Path) -> Any:
    return _bits(folder, False)


def fsdp2_bits_on(folder: Path) -> Any:
    return _bits(folder, True)


class Unpadded(PaddingCollator):
    """Rows of one width; context parallelism takes no mask."""

    def __call__(self, features: list[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        del batch["attention_mask"]
        return batch


def _attention_over_ranks(
    module: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any
) -> Any:
    """Causal attention over the rows of all ranks: torch's ring attention has no CPU kernel."""
    ranks = dist.get_world_size()
    # How torch balances the load: of four parts, rank 0 holds the first and the last.
    parts = torch.arange(query.shape[2] * ranks).chunk(2 * ranks)
    held = [torch.cat([parts[r], parts[-1 - r]]) for r in range(ranks)]
    key, value = (torch.cat(all_gather(part.contiguous()), dim=2) for part in (key, value))
    mask = held[dist.get_rank()][:, None] >= torch.cat(held)
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = (query @ key.transpose(2, 3)) * module.scaling
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def context_parallel(folder: Path) -> Any:
    """Both ranks train on halves of the same rows."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention_over_ranks
    trainer = run(
        folder,
        config=COUNTS,
        records=fixed_records(32),
        collator=Unpadded(),
        model=tiny_model(attention_dropout=0.0, attn_implementation="sdpa"),
        parallelism_config=ParallelismConfig(cp_size=2),
        max_steps=4,
        **FSDP2,
    )
    held_out = Dataset.from_list(fixed_records(10, seed=1))
    evaluated = trainer.evaluate(held_out)
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    return told(trainer, evaluated=evaluated)


def tensor_parallel(folder: Path) -> Any:
    """Both ranks train on the same rows, with a part of each weight."""
    # What transformers has left for accelerate in the cases before.
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    saved = folder / "model"
    tiny_model(**TP_SIZES).save_pretrained(saved)  # by the first rank only
    dist.barrier()
    model = Qwen2ForCausalLM.from_pretrained(saved, tp_plan="auto", dtype=torch.float32)
    trainer = run(folder, config=COUNTS, records=make_records(64), model=model)
    held_out = Dataset.from_list(make_records(10, seed=1))
    return told(trainer, evaluated=trainer.evaluate(held_out))


CASES = cases_of(globals())
