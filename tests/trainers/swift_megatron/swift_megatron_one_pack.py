"""One pack of two sequences on two context-parallel ranks, for ms-swift's own functions and ours.

Every token of the first sequence has loss 1, of the second 5. Prints {cut: [theirs, ours]}, what
comes of a target that crosses the bound of the sequences, and the messages of what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from swift.megatron.trainers.reranker_trainer import MegatronRerankerTrainer
from swift.megatron.trainers.trainer import MegatronTrainer

from channel_metrics import MetricsConfig
from channel_metrics.core.labels import LabelTable
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.trainers.swift import patch as swift_patch
from channel_metrics.trainers.swift_megatron import attach, check_megatron_trainer, detach, patch
from channel_metrics.trainers.swift_megatron.batch import sequence_channels

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


def crossing(cut: str) -> dict[str, Any]:
    """The last token of the first sequence is trained to predict the first of the second."""
    batch = batch_of_two()
    batch["labels"][0, LENGTH] = 2
    ours = attach(trainer_for(cut), MetricsConfig(metrics=("loss", "tokens", "samples")))
    for _ in range(2):
        losses_of(ours, ours._prepare_batch({**batch, "labels": batch["labels"].clone()}))
    return {
        "values": ours.channel_metrics.close(1).logs,
        "told": sorted(ours.channel_metrics.warned),
    }


def crossing_uncut() -> list[Any]:
    """The same without context parallelism: bounds in the shifted labels, and crossings."""
    batch = batch_of_two()
    batch["labels"][0, LENGTH] = 2
    args = trainer_for("zigzag").args
    args.context_parallel_size = 1
    found = sequence_channels(args, batch, LabelTable())
    assert found.cu_seqlens is not None
    numbered = batch | {"channel": [1, 0]}
    of_classes = sequence_channels(args, numbered, LabelTable(), {"channel": ("code", "math")})
    assert list(of_classes) == ["math", "code"]
    return [found.cu_seqlens.tolist(), found.ids.tolist(), found.num_crossings]


def refusals() -> dict[str, str]:
    args = trainer_for("zigzag").args
    batch = batch_of_two()
    of_batch = {
        "one_name": batch | {"channel": ["math"]},
        "no_number": {k: v for k, v in batch.items() if k != "seq_lens"},
        "positions": batch | {"position_ids": torch.arange(2 * LENGTH).unsqueeze(0)},
        # Three pieces for two names; the last would look like padding.
        "pieces": batch | {"position_ids": batch["position_ids"] % torch.tensor([4] * 8 + [8] * 8)},
    }
    found = {
        name: message(partial(sequence_channels, args, given, LabelTable()))
        for name, given in of_batch.items()
    }
    other_task = trainer_for("zigzag")
    other_task.args.task_type = "seq_cls"
    found["task"] = message(lambda: attach(other_task))
    found["reranker"] = message(lambda: check_megatron_trainer(MegatronRerankerTrainer))
    names = MetricsConfig(key_format="{metric}/{channel}")
    found["keys"] = message(lambda: attach(trainer_for("zigzag"), names))
    reserved = MetricsConfig(channels=("z",))
    found["reserved"] = message(lambda: attach(trainer_for("zigzag"), reserved))
    return found


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except ChannelMetricsError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def classes() -> list[bool]:
    """Whether attaching keeps the name of the class, and detaching restores the class."""
    trainer = attach(attach(trainer_for("zigzag")))
    attached = type(trainer)
    detach(trainer)
    return [
        attached is not MegatronTrainer,
        attached.__name__ == "MegatronTrainer",
        type(trainer) is MegatronTrainer,
        not hasattr(trainer, "channel_metrics"),
    ]


def patches() -> list[bool]:
    """Whether the patch is applied once, and undone."""
    original = MegatronTrainer.__init__
    patch.apply(MetricsConfig())
    patched = MegatronTrainer.__init__
    patch.apply(MetricsConfig())
    once = MegatronTrainer.__init__ is patched and patch.is_applied()
    swift_patch.revert()
    return [patched is not original, once, MegatronTrainer.__init__ is original]


def main() -> None:
    dist.init_process_group()
    mpu.initialize_model_parallel(context_parallel_size=2)
    found: dict[str, Any] = {}
    for cut in ("zigzag", "contiguous"):
        theirs = trainer_for(cut)
        sums = losses_of(theirs, theirs._prepare_batch(batch_of_two()))
        ours = attach(trainer_for(cut), MetricsConfig(metrics=("loss", "tokens")))
        losses_of(ours, ours._prepare_batch(batch_of_two()))
        values = ours.channel_metrics.close(1).logs
        found[cut] = [
            {name: float(sums[f"loss_{name}"][0] / sums[f"loss_{name}"][1]) for name in LOSSES},
            values,
        ]
        found[f"crossing_{cut}"] = crossing(cut)
    found |= {"uncut": crossing_uncut(), "refusals": refusals(), "classes": classes()}
    found["patches"] = patches()
    print(json.dumps(found))
    dist.destroy_process_group()


main()
