"""A loop of one's own on two real processes: DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_case_tools import HF
from hf_tools import PaddingCollator, tiny_model
from loop_tools import (
    RECORDS,
    check,
    logits_loss,
    model_loss,
    on_and_off,
    plain_oracle,
    run_loop,
)
from rank_cases import Case, RanksOf, case
from torch._dynamo.utils import counters
from torch.distributed import fsdp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from channel_metrics import ChannelMetrics, evaluate

# Below torch 2.6 it has another place, and needs a GPU.
fully_shard: Any = getattr(fsdp, "fully_shard", None)
NEEDS_FSDP2 = pytest.mark.skipif(fully_shard is None, reason="needs torch 2.6 on a CPU")
two = case(HF, ranks=2)


def of_this_rank(forward: Any, model: Any, called: Any, **more: Any) -> Any:
    return run_loop(
        forward, model, called=called, rank=dist.get_rank(), size=dist.get_world_size(), **more
    )


# ---- DDP and FSDP2 ------------------------------------------------------------------------------


def ddp(on: bool, forward: Any = model_loss, compile: Any = None, **options: Any) -> Any:
    model = tiny_model(attention_dropout=options.pop("dropout", 0.1))
    called: Any = DistributedDataParallel(model)
    called = compile(called) if compile else called
    return of_this_rank(forward, model, called, on=on, **options), model


@two
def ddp_bits(folder: Path) -> Any:
    return on_and_off(ddp)


@two
def ddp_values(folder: Path) -> Any:
    frozen = {"dropout": 0.0, "learning_rate": 0.0}
    ways = {"model": model_loss, "logits": logits_loss}
    return {way: ddp(True, forward, **frozen)[0] for way, forward in ways.items()}


def by_call(model: torch.nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: torch.nn.Module) -> Any:
    model.compile(backend="eager")
    return model


@two
def ddp_compiled(folder: Path) -> Any:
    """What came of each way to compile, and the windows of a model that is not compiled."""
    found: list[Any] = []
    for compile in (by_call, in_place):
        graphs: list[Any] = []

        def run(on: bool, compile: Any = compile, graphs: Any = graphs) -> Any:
            torch._dynamo.reset()
            counters.clear()
            result = ddp(on, compile=compile, steps=2)
            graphs.append(dict(counters["stats"]))
            return result

        found.append({**on_and_off(run), "graphs": graphs})
    torch.manual_seed(7)
    return found, ddp(True, steps=2)[0]


@two
def sampler_repeats(folder: Path) -> Any:
    """An evaluation set that torch's sampler fills up for the ranks."""
    model, metrics = tiny_model(attention_dropout=0.0), ChannelMetrics()
    collate: Any = metrics.collator(PaddingCollator())
    found = {}
    for count in (1, 5, 7, 8):
        records: Any = RECORDS[:count]
        sampler: Any = DistributedSampler(records, shuffle=False)
        loader = DataLoader(records, batch_size=3, collate_fn=collate, sampler=sampler)
        found[count] = evaluate(metrics, model, loader, step=1)
    return found


def test_records_that_a_sampler_repeats_count_once(ranks_of: RanksOf) -> None:
    for rank in ranks_of(sampler_repeats):
        for count, logs in rank.items():
            check(logs, plain_oracle(RECORDS[:count], prefix="eval_"))


def sharded(on: bool, dropout: float = 0.1, rate: float = 1e-2, forward: Any = model_loss) -> Any:
    model: Any = tiny_model(attention_dropout=dropout)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return of_this_rank(forward, model, model, on=on, learning_rate=rate), model


@two
def fsdp2_bits(folder: Path) -> Any:
    return fully_shard and on_and_off(sharded)


@two
def fsdp2_values(folder: Path) -> Any:
    frozen = {"dropout": 0.0, "rate": 0.0}
    return fully_shard and {
        "model": sharded(True, **frozen)[0],
        "logits": sharded(True, **frozen, forward=logits_loss)[0],
    }


@pytest.mark.parametrize("case", [ddp_bits, pytest.param(fsdp2_bits, marks=NEEDS_FSDP2)])
def test_training_is_the_same_bit_for_bit(ranks_of: RanksOf, case: Case) -> None:
    first, second = ranks_of(case)
    assert first["on"] == first["off"] and second["on"] == second["off"]
    assert first["logs"] == second["logs"] and len(first["logs"]) == 2


@pytest.mark.parametrize("case", [ddp_values, pytest.param(fsdp2_values, marks=NEEDS_FSDP2)])
@pytest.mark.parametrize("way", ["model", "logits"])
def test_two_ranks_equal_a_plain_computation(ranks_of: RanksOf, case: Case, way: str) -> None:
    for rank in ranks_of(case):
        first, second = rank[way]
        check(first, plain_oracle(RECORDS[:16]))
        check(second, plain_oracle(RECORDS[16:32]))


def test_a_compiled_ddp(ranks_of: RanksOf) -> None:
    """No more graphs than without metrics, and the same training bit for bit."""
    for found, (wanted,) in ranks_of(ddp_compiled):
        for compiled in found:
            off, on = compiled["graphs"]
            assert on == off and on["unique_graphs"] > 0
            assert compiled["on"] == compiled["off"]
            check(compiled["logs"][0], wanted)
