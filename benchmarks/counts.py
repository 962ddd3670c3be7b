"""What is counted and not timed: waits for the device, and collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.peers import start_one_rank
from benchmarks.swift_peer import SwiftLoop, swift_megatron
from benchmarks.update import Case, make_tokens
from benchmarks.veomni_peer import VeOmni
from channel_metrics import ChannelLossAccumulator
from channel_metrics.core.names import joint_name
from channel_metrics.core.schema import DEFAULT_METRICS
from channel_metrics.core.text_sizes import TextSizes
from channel_metrics.ranks.sync import sync

__all__ = ["run"]

CASE = Case(8_192, 256, 16)
BARS = ("loss", "loss_se")
FULL = (*BARS, "token_acc", "token_acc_se", "bits_per_byte")
_READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor")


# Operators that give another look at the same memory: a device has nothing to do for them.
_VIEWS = ("alias", "detach", "expand", "narrow", "select", "slice", "unbind", "view")


class _Operators(TorchDispatchMode):
    """Counts operators, and those for which a host would wait for its device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.num_operators = self.num_syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor)]
        # Indexing is tagged for the sake of bool masks; with integers the shape is known.
        static = func is torch.ops.aten.index.Tensor and all(x.dtype != torch.bool for x in indices)
        self.num_operators += func.overloadpacket.__name__ not in _VIEWS
        self.num_syncs += bool(_READS_VALUES & set(func.tags)) and not static
        return func(*args, **(kwargs or {}))


def run() -> list[dict[str, object]]:
    """Operators and waits per micro-batch, collectives per micro-batch and log window."""
    start_one_rank()
    tokens = make_tokens(CASE)
    names = [f"channel{i}" for i in tokens.ids.tolist()]
    distinct = sorted(set(names))
    # The meta device holds no values: reading one is an error, whatever is counted.
    given: dict[str, Any] = {
        "token_losses": tokens.losses.to("meta"),
        "channels": tokens.ids.to("meta"),
        "cu_seqlens": tokens.bounds.to("meta"),
        "loss_mask": tokens.mask.to("meta"),
    }
    correct, labels = tokens.correct.to("meta"), tokens.unshifted_labels().to("meta")
    on_axes = [
        joint_name(name, [("domain", "x"), ("kind", name), ("size", "y")]) for name in distinct
    ]
    sizes = torch.ones(9, dtype=torch.int64, device="meta")

    def updating(names: list[Any] = distinct, *metrics: str, **more: Any) -> Callable[[], object]:
        table = ChannelLossAccumulator(names, device="meta", metrics=metrics or DEFAULT_METRICS)
        table.text_sizes = TextSizes(sizes, sizes) if "labels" in more else None
        return lambda: table.update(**given, **more)

    def logging(names: list[Any] = distinct, *metrics: str) -> Callable[[], object]:
        table = ChannelLossAccumulator(names, metrics=metrics or DEFAULT_METRICS)
        sync(table)  # the first one agrees on the names
        return lambda: sync(table)

    loop = SwiftLoop(names, tokens.bounds)
    megatron = swift_megatron(tokens.losses, tokens.mask, tokens.bounds, names)
    veomni = VeOmni.of_packed(tokens.ids.tolist(), tokens.bounds)
    return [
        _row("ours", updating(), logging()),
        _row("ours, accuracy", updating(correct=correct), logging()),
        _row("ours, error bars", updating(distinct, *BARS), logging(distinct, *BARS)),
        _row(
            "ours, accuracy, 3 axes, error bars, bytes",
            updating(on_axes, *FULL, correct=correct, labels=labels),
            logging(on_axes, *FULL),
        ),
        _row(
            "ours, entropy",
            updating(distinct, "loss", "entropy", entropy=given["token_losses"]),
            logging(distinct, "loss", "entropy"),
        ),
        _row(
            "ms-swift, HF", lambda: loop.update(tokens.losses, tokens.unshifted_labels()), loop.log
        ),
        # What it reduces in each micro-batch is what its log shows.
        _row("ms-swift, Megatron", megatron, lambda: None),
        _row("VeOmni", veomni.aggregation(tokens.losses, tokens.mask), veomni.log),
    ]


def _row(
    variant: str, micro_batch: Callable[[], object], log: Callable[[], object]
) -> dict[str, object]:
    with _Operators() as operators, _counted_collectives() as in_batch:
        micro_batch()
    with _counted_collectives() as in_log:
        log()
    return {
        "variant": variant,
        "num_sequences": CASE.num_sequences,
        "num_channels": CASE.num_channels,
        "operators_per_micro_batch": operators.num_operators,
        "syncs_per_micro_batch": operators.num_syncs,
        "collectives_per_micro_batch": len(in_batch),
        "collectives_per_log": len(in_log),
    }


@contextmanager
def _counted_collectives() -> Iterator[list[str]]:
    called: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in _COLLECTIVES}
    for name, function in originals.items():
        setattr(dist, name, counting(name, function))
    try:
        yield called
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
