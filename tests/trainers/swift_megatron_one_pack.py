"""One pack of two sequences on two context-parallel ranks, for ms-swift's own functions and ours.

Every token of the first sequence has loss 1, of the second 5. Prints {cut: [theirs, ours]}.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from swift.megatron.trainers.trainer import MegatronTrainer

from channel_metrics import MetricsConfig
from channel_metrics.trainers.swift_megatron import attach

LENGTH = 8
LOSSES = {"math": 1.0, "code": 5.0}


def trainer_for(cut: str) -> Any:
    """A trainer without a model: the functions need no more than its arguments."""
    trainer = MegatronTrainer.__new__(MegatronTrainer)
    trainer.args = SimpleNamespace(
        task_type="causal_lm",
        padding_free=True,
        is_multimodal=False,
        enable_dft_loss=False,
        enable_channel_loss=True,
        pipeline_model_parallel_size=1,
        context_parallel_size=2,
        cp_partition_mode=cut,
    )
    return trainer


def batch_of_two() -> dict[str, Any]:
    """Labels say which sequence a token is of; the first token of each is no target."""
    labels = torch.tensor([[-100] + [1] * (LENGTH - 1) + [-100] + [2] * (LENGTH - 1)])
    positions = torch.arange(LENGTH).repeat(2).unsqueeze(0)
    return {
        "input_ids": labels.clone(),
        "labels": labels,
        "position_ids": positions,
        "seq_lens": [LENGTH, LENGTH],
        "channel": list(LOSSES),
    }


def losses_of(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What the loss function reports, called as `forward_step` calls it."""
    values = torch.tensor([0.0, *LOSSES.values()])
    losses = values[batch["labels"].clamp(min=0)]
    keys = ("labels", "channel", "packed_seq_params")
    labels, channels, packed = (batch[key] for key in keys)
    report = trainer.loss_func(losses, labels=labels, channels=channels, packed_seq_params=packed)
    sums: dict[str, Any] = report[2]
    return sums


def main() -> None:
    dist.init_process_group()
    mpu.initialize_model_parallel(context_parallel_size=2)
    found = {}
    for cut in ("zigzag", "contiguous"):
        theirs = trainer_for(cut)
        sums = losses_of(theirs, theirs._prepare_batch(batch_of_two()))
        ours = attach(trainer_for(cut), MetricsConfig(metrics=("loss", "tokens")))
        losses_of(ours, ours._prepare_batch(batch_of_two()))
        values = ours.channel_metrics.train.compute()
        found[cut] = [
            {name: float(sums[f"loss_{name}"][0] / sums[f"loss_{name}"][1]) for name in LOSSES},
            values,
        ]
    print(json.dumps(found))
    dist.destroy_process_group()


main()
