"""The channel losses of ms-swift, run from its own installed source, and other ways to do it.

ms-swift's two are lines inside larger methods, whose modules need a GPU stack to be imported.
Their source is cut out of the installed package by its syntax tree and run as it is.
"""

from __future__ import annotations

import ast
import tempfile
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["segment_reduction", "start_one_rank", "swift_hf_loop", "swift_megatron"]

Call = Callable[[], object]


def start_one_rank() -> None:
    """A process group of one rank: some peers cannot do without."""
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp()) / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def swift_hf_loop(losses: Tensor, mask: Tensor, bounds: Tensor, channels: list[str]) -> Call:
    """ms-swift's Seq2SeqTrainer: a slice, a selection and an `.item()` per sequence."""
    tree = _tree("swift/trainers/seq2seq_trainer.py")
    block = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.args.enable_channel_loss"
        and any(isinstance(child, ast.For) for child in node.body)
    )
    code = _compiled(block)
    mean_metric: Any = _class("swift/metrics/utils.py", ("Metric", "MeanMetric"))["MeanMetric"]
    labels = torch.where(mask, 1, -100).roll(1)
    trainer = SimpleNamespace(
        args=SimpleNamespace(enable_channel_loss=True),
        custom_metrics={"train": defaultdict(lambda: mean_metric(device="cpu"))},
        template=SimpleNamespace(sequence_parallel_size=1, padding_free=True),
        get_cu_seqlens=lambda *_: bounds,
    )
    names = {
        "self": trainer,
        "torch": torch,
        "mode": "train",
        "labels": labels,
        "channels": channels,
        "inputs": {},
        "text_position_ids": None,
        "outputs": SimpleNamespace(loss=losses),
    }
    return lambda: exec(code, dict(names))


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
        exec(_function(f"swift/megatron/trainers/{file}.py", name), names)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(padding_free=True, context_parallel_size=1),
        _all_reduce_metric=_bound(names["_all_reduce_metric"]),
    )
    packed = SimpleNamespace(seq_lens=bounds.diff(), cu_seqlens_q=bounds)
    compute: Any = names["_compute_channel_loss"]
    return lambda: compute(trainer, losses[None], mask[None], channels, packed)


def segment_reduction(losses: Tensor, mask: Tensor, bounds: Tensor, ids: Tensor) -> Call:
    """The least that plain PyTorch needs for [sum, count] per channel of a packed batch."""
    num_channels = int(ids.max()) + 1

    def call() -> Tensor:
        lengths = bounds.diff().long()
        columns = torch.stack([losses * mask, mask.to(losses)], dim=-1)
        sums = torch.segment_reduce(columns, "sum", lengths=lengths, axis=0, unsafe=True)
        return sums.new_zeros(num_channels, 2).index_add_(0, ids, sums)

    return call


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    if "self" in function.__code__.co_varnames[:1]:
        return lambda *args, **kwargs: function(None, *args, **kwargs)
    return function


def _tree(path: str) -> ast.Module:
    file = Path(str(metadata.distribution("ms-swift").locate_file(path)))
    return ast.parse(file.read_text())


def _compiled(*nodes: ast.stmt) -> CodeType:
    module = ast.Module(body=list(nodes), type_ignores=[])
    return compile(ast.fix_missing_locations(module), "ms-swift", "exec")


def _function(path: str, name: str) -> CodeType:
    node = next(
        n for n in ast.walk(_tree(path)) if isinstance(n, ast.FunctionDef) and n.name == name
    )
    node.decorator_list = []
    return _compiled(node)


def _class(path: str, wanted: tuple[str, ...]) -> dict[str, Any]:
    import abc

    import numpy as np

    names: dict[str, Any] = {"ABC": abc.ABC, "abstractmethod": abc.abstractmethod}
    names |= {"torch": torch, "np": np, "dist": dist, "get_current_device": lambda: "cpu"}
    nodes = [n for n in _tree(path).body if isinstance(n, ast.ClassDef) and n.name in wanted]
    exec(_compiled(*nodes), names)
    return names
