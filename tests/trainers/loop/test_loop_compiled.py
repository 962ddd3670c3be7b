"""Compiled models: the same values, and nothing more is compiled than without metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hf_tools import PaddingCollator, make_records, tiny_model, token_table
from loop_tools import (
    check,
    logits_loss,
    model_loss,
    no_trace,
    oracle,
    state_of,
)
from torch._dynamo.utils import counters

from channel_metrics import ChannelMetrics, evaluate

# Two shapes: at the second one, torch makes a graph for all. With aot_eager that is slow.
RECORDS = [record for record in make_records(400) if len(record["input_ids"]) == 12][:16]
LONGER = [record for record in make_records(400, seed=1) if len(record["input_ids"]) == 15][:8]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def by_call(model: torch.nn.Module, **how: Any) -> Any:
    """The model as `torch.compile` returns it."""
    return torch.compile(model, **how)


def in_place(model: torch.nn.Module, **how: Any) -> torch.nn.Module:
    model.compile(**how)
    return model


def parts(model: Any, **how: Any) -> Any:
    """Only the layers are compiled: the loss is not."""
    for layer in model.model.layers:
        layer.compile(**how)
    return model


def trained(
    on: bool,
    model: torch.nn.Module,
    compile: Callable[..., torch.nn.Module],
    forward: Callable[..., torch.Tensor],
    backend: str,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The windows of a training, and what was compiled in it."""
    torch._dynamo.reset()
    counters.clear()
    called = compile(model, backend=backend)
    metrics = ChannelMetrics() if on else None
    collate = PaddingCollator() if metrics is None else metrics.collator(PaddingCollator())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    logs = []
    windows = (RECORDS[:8], RECORDS[8:] if backend == "aot_eager" else LONGER)
    for step, records in enumerate(windows, start=1):
        for first in (0, 4):
            loss = forward(metrics, called, collate(records[first : first + 4]))
            (loss * 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
        if metrics is not None:
            logs.append(metrics.close(step).logs)
    kept = {name: dict(counters[name]) for name in ("graph_break", "recompiles", "unimplemented")}
    return logs, {**kept, "graphs": counters["stats"]["unique_graphs"]}


# What torch itself warns of where compiled layers follow layers that are not.
ignoring = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@ignoring
@pytest.mark.parametrize(
    ("kind", "compile", "backend"),
    [
        ("transformers", by_call, "aot_eager"),
        ("transformers", in_place, "eager"),
        ("transformers", parts, "eager"),
        ("logits", by_call, "eager"),
    ],
)
def test_compiled(kind: str, compile: Any, backend: str) -> None:
    forward = model_loss if kind == "transformers" else logits_loss
    compiled = {}

    def run(on: bool) -> tuple[Any, torch.nn.Module]:
        model = tiny_model(attention_dropout=0.0)
        logs, compiled[on] = trained(on, model, compile, forward, backend)
        return logs, model

    first, second = no_trace(run)
    assert compiled[True] == compiled[False] and compiled[True]["graphs"] > 0
    table = token_table(tiny_model(attention_dropout=0.0), RECORDS)
    check(first, oracle(table, RECORDS[:8]))
    assert second.keys() != first.keys() or second != first


def test_evaluation_of_a_compiled_model() -> None:
    model = tiny_model(attention_dropout=0.0)
    called, metrics = by_call(model, backend="eager"), ChannelMetrics()
    collate, before = metrics.collator(PaddingCollator()), state_of(model)
    found = evaluate(metrics, called, [collate(RECORDS[:8]), collate(RECORDS[8:])], step=1)
    assert called.training and state_of(model) == before
    check(found, oracle(token_table(model, RECORDS), RECORDS, prefix="eval_"))
