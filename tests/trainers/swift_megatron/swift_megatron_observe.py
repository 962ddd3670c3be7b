"""What is seen of a run of ms-swift's Megatron trainer; observers as in `megatron_lm.observe`."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import faults
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron_lm.observe import checksum, collectives
from swift.megatron.trainers.base import BaseMegatronTrainer
from swift.megatron.trainers.trainer import MegatronTrainer

__all__ = ["collectives", "end", "fault", "lie", "logs", "tokens", "used"]

Result = Callable[[], Any]


def logs() -> Result:
    """What ms-swift hands to its writers, per log."""
    found: list[dict[str, Any]] = []
    call_event = BaseMegatronTrainer.call_event

    @functools.wraps(call_event)
    def keep(self: Any, event: str, **kwargs: Any) -> None:
        if event == "on_log":
            found.append({"iteration": self.state.iteration, **kwargs["logs"]})
        call_event(self, event, **kwargs)

    BaseMegatronTrainer.call_event = keep
    return lambda: found


def end() -> Result:
    """Checksums of the weights and of the random numbers to come, when training ends."""
    found: dict[str, Any] = {}
    finalize = BaseMegatronTrainer.finalize_training

    @functools.wraps(finalize)
    def keep(self: Any) -> None:
        for chunk, model in enumerate(self.unwrapped_models):
            for name, parameter in model.named_parameters():
                found[f"{chunk}.{name}"] = checksum(parameter)
        found["random"] = checksum(torch.get_rng_state())
        finalize(self)

    BaseMegatronTrainer.finalize_training = keep
    return lambda: found


def tokens() -> Result:
    """Each token that this rank trained on, by a loop over tokens, without the library.

    Per micro-batch: [training, channels of the sequences, [[channel, nll, optimised, right], ...]];
    only on ranks that have a loss, and of the tensor-parallel ones on the first. What a position
    predicts is the token after it; sequence i of a pack begins where its positions begin.
    """
    found: list[Any] = []
    right: list[Any] = []
    compute, loss_func = LanguageModule.compute_language_model_loss, MegatronTrainer.loss_func

    @functools.wraps(compute)
    def compute_loss(self: Any, labels: Any, logits: Any, *args: Any) -> Any:
        parts = [
            torch.empty_like(logits) for _ in range(mpu.get_tensor_model_parallel_world_size())
        ]
        tp_group = mpu.get_tensor_model_parallel_group()
        dist.all_gather(parts, logits.detach().contiguous(), group=tp_group)
        right.append((torch.cat(parts, -1).argmax(-1).transpose(0, 1) == labels).tolist())
        return compute(self, labels, logits, *args)

    @functools.wraps(loss_func)
    def keep(self: Any, output: Any, *, labels: Any, loss_scale: Any = None, **kw: Any) -> Any:
        correct = right.pop()
        packed = kw.get("packed_seq_params")
        num_sequences = len(labels) if packed is None else len(packed.seq_lens)
        names = list(kw["channels"] or [None] * num_sequences)
        rows = []
        for row, column in torch.nonzero(labels != -100).tolist():
            sequence = row if packed is None else sequence_at(self.args, packed, column, labels)
            nll = output[row, column].item()
            scale = 1.0 if loss_scale is None else loss_scale[row, column].item()
            scale *= math.exp(-nll) if self.args.enable_dft_loss else 1.0
            rows.append([names[sequence], nll, nll * scale, correct[row][column]])
        if mpu.get_tensor_model_parallel_rank() == 0:
            found.append([self.unwrapped_models[0].training, names, rows])
        return loss_func(self, output, labels=labels, loss_scale=loss_scale, **kw)

    LanguageModule.compute_language_model_loss = compute_loss
    MegatronTrainer.loss_func = keep
    return lambda: found


def sequence_at(args: Any, packed: Any, column: int, labels: Any) -> int:
    """The sequence of the token that is predicted at `column` of what this rank has of a pack."""
    size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    bounds = packed.cu_seqlens_q.tolist()
    if args.cp_partition_mode == "contiguous":
        stream = list(range(bounds[-1]))
        own = stream[rank * labels.shape[1] : (rank + 1) * labels.shape[1]]
    else:
        own = []
        for start, end in pairwise(bounds):
            chunk = (end - start) // (2 * size)
            mine = (rank, 2 * size - 1 - rank)
            own += [start + c * chunk + i for c in mine for i in range(chunk)]
        own = own if size > 1 else list(range(bounds[-1]))
    return max(i for i, bound in enumerate(bounds) if bound <= own[column] + 1)


def fault() -> Result:
    """Makes the last rank fail in our own code, at its third micro-batch."""
    calls: list[int] = []

    def failing(original: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and dist.get_rank() == 1:
            raise RuntimeError("a fault of ours")
        return original(*args, **kwargs)

    faults.install("read ms-swift's Megatron batch", failing)
    return lambda: len(calls)


def lie() -> Result:
    """The sum that the loss function reports is one per cent too large."""
    loss_func = MegatronTrainer.loss_func

    @functools.wraps(loss_func)
    def lying(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss, num_tokens, report = loss_func(self, *args, **kwargs)
        report["loss"][0] *= 1.01
        return loss, num_tokens, report

    MegatronTrainer.loss_func = lying
    return lambda: None


def used() -> Result:
    """What of the arguments ms-swift has really used, for it may change them, and of its state."""
    found: dict[str, Any] = {}
    finalize = BaseMegatronTrainer.finalize_training

    @functools.wraps(finalize)
    def keep(self: Any) -> None:
        for name in ("padding_free", "cp_partition_mode", "context_parallel_size"):
            found[name] = getattr(self.args, name)
        found["best"] = self.state.best_metric
        found["path"] = [Path(entry).resolve().name for entry in sys.path]
        finalize(self)

    BaseMegatronTrainer.finalize_training = keep
    return lambda: found
