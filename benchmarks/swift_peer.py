"""The channel losses of ms-swift, from its own installed source, see `peers`."""

from __future__ import annotations

import abc
import ast
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import Call, compiled, definition, source_tree, start_one_rank

__all__ = ["SwiftLoop", "swift_megatron", "swift_token_losses"]

_PACKAGE = "ms-swift"


class SwiftLoop:
    """ms-swift's Seq2SeqTrainer: a slice, a selection and an `.item()` per sequence.

    channels: names, one per sequence. bounds: [N + 1] of packed sequences; None means that each
    row is one.
    """

    def __init__(self, channels: list[str], bounds: Tensor | None) -> None:
        tree = source_tree(_PACKAGE, "swift/trainers/seq2seq_trainer.py")
        block = next(
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.If)
            and ast.unparse(node.test) == "self.args.enable_channel_loss"
            and any(isinstance(child, ast.For) for child in node.body)
        )
        self._code = compiled([block])
        self.metrics: defaultdict[str, Any] = defaultdict(_mean_metric)
        self._trainer = SimpleNamespace(
            args=SimpleNamespace(enable_channel_loss=True),
            custom_metrics={"train": self.metrics},
            template=SimpleNamespace(sequence_parallel_size=1, padding_free=bounds is not None),
            get_cu_seqlens=lambda *_: bounds,
        )
        self._channels = channels

    def update(self, losses: Tensor, labels: Tensor) -> None:
        """One micro-batch; labels are those of the batch, and losses those of their shift."""
        names = {
            "self": self._trainer,
            "torch": torch,
            "mode": "train",
            "labels": labels,
            "channels": self._channels,
            "inputs": {},
            "text_position_ids": None,
            "outputs": SimpleNamespace(loss=losses),
        }
        exec(self._code, names)

    def log(self) -> dict[str, float]:
        """What a log sums over all ranks, by key."""
        names: dict[str, Any] = {"dist": dist, "Dict": dict}
        exec(definition(source_tree(_PACKAGE, "swift/trainers/mixin.py"), _LOG), names)
        values: dict[str, float] = names[_LOG](self.metrics)
        return values


_LOG = "compute_custom_metrics"


def swift_token_losses() -> Callable[[Any, Tensor], Tensor]:
    """(outputs of the model, labels [B, S]) -> losses [B * S] that ms-swift trains on."""
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(definition(source_tree(_PACKAGE, "swift/trainers/utils.py"), "per_token_loss_func"), names)
    found: Callable[[Any, Tensor], Tensor] = names["per_token_loss_func"]
    return found


def swift_megatron(losses: Tensor, mask: Tensor, bounds: Tensor, channels: list[str]) -> Call:
    """ms-swift's MegatronTrainer, padding-free: per token ids, and collectives each time."""
    start_one_rank()
    group = SimpleNamespace(get_data_parallel_group=lambda **_: dist.group.WORLD)
    names: dict[str, Any] = {
        "torch": torch,
        "dist": dist,
        "defaultdict": defaultdict,
        "mpu": group,
        "get_current_device": lambda: "cpu",
    }
    for file, name in (("trainer", "_compute_channel_loss"), ("base", "_all_reduce_metric")):
        exec(definition(source_tree(_PACKAGE, f"swift/megatron/trainers/{file}.py"), name), names)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(padding_free=True, context_parallel_size=1),
        _all_reduce_metric=_bound(names["_all_reduce_metric"]),
    )
    packed = SimpleNamespace(seq_lens=bounds.diff(), cu_seqlens_q=bounds)
    compute: Any = names["_compute_channel_loss"]
    return lambda: compute(trainer, losses[None], mask[None], channels, packed)


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    if "self" in function.__code__.co_varnames[:1]:
        return lambda *args, **kwargs: function(None, *args, **kwargs)
    return function


def _mean_metric() -> Any:
    tree = source_tree(_PACKAGE, "swift/metrics/utils.py")
    wanted = ("Metric", "MeanMetric")
    nodes: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in wanted
    ]
    names: dict[str, Any] = {"ABC": abc.ABC, "abstractmethod": abc.abstractmethod}
    names |= {"torch": torch, "np": np, "dist": dist, "get_current_device": lambda: "cpu"}
    exec(compiled(nodes), names)
    return names["MeanMetric"](device="cpu")
