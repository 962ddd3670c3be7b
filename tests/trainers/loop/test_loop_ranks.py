"""A loop of one's own on two real processes: DDP, FSDP2, accelerate; and accelerate on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from hf_case_tools import HF, weights_hash
from hf_tools import PaddingCollator, tiny_model
from loop_tools import RECORDS, check, logits_loss, model_loss, plain_oracle, run_loop
from rank_cases import Case, RanksOf, case
from said import warnings_of_ours
from torch._dynamo.utils import counters
from torch.distributed import fsdp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from channel_metrics import ChannelMetrics, ChannelMetricsError, evaluate

# Below torch 2.6 it has another place, and needs a GPU.
fully_shard: Any = getattr(fsdp, "fully_shard", None)
NEEDS_FSDP2 = pytest.mark.skipif(fully_shard is None, reason="needs torch 2.6 on a CPU")
two, one = case(HF, ranks=2), case(HF, ranks=1)


def on_and_off(run: Any) -> dict[str, Any]:
    """Windows of a run with metrics, and the weights of a run with them and of one without."""
    torch.manual_seed(7)
    _, off = run(False)
    torch.manual_seed(7)
    logs, on = run(True)
    return {"logs": logs, "on": weights_hash(on), "off": weights_hash(off)}


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


# ---- accelerate ---------------------------------------------------------------------------------


def accelerated(on: bool, dropout: float = 0.1, rate: float = 1e-2) -> Any:
    """accelerate's usual loop: prepare, accumulate, an evaluation that repeats records."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    metrics = ChannelMetrics() if on else None
    collate: Any = PaddingCollator() if metrics is None else metrics.collator(PaddingCollator())
    model = tiny_model(attention_dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    records: Any = RECORDS
    loader: Any = DataLoader(records[:32], batch_size=2, collate_fn=collate)
    held: Any = DataLoader(records[33:46], batch_size=2, collate_fn=collate)
    called, optimizer, loader, held = accelerator.prepare(model, optimizer, loader, held)
    logs, step = [], 0
    for batch in loader:
        with accelerator.accumulate(called):
            loss = model_loss(metrics, called, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        if metrics is not None and accelerator.sync_gradients and step % 2 == 0:
            logs.append(metrics.close(step).logs)
            if step == 4:
                logs.append(evaluate(metrics, called, held, step=step, accelerator=accelerator))
        elif metrics is None and accelerator.sync_gradients and step == 4:
            called.eval()
            for evaluated in held:
                with torch.no_grad():
                    called(**evaluated)
            called.train()
    return logs, accelerator.unwrap_model(called)


def accelerate_runs() -> dict[str, Any]:
    return {**on_and_off(accelerated), "frozen": accelerated(True, dropout=0.0, rate=0.0)[0]}


@two
def accelerate_on_two(folder: Path) -> Any:
    return accelerate_runs()


@one
def accelerate_on_one(folder: Path) -> Any:
    return accelerate_runs()


@pytest.mark.parametrize("case", [accelerate_on_one, accelerate_on_two])
def test_accelerate(ranks_of: RanksOf, case: Case) -> None:
    ranks = ranks_of(case)
    records = RECORDS[:32]
    each = 8 * case.ranks
    windows = [plain_oracle(records[i : i + each]) for i in range(0, 32, each)]
    windows.insert(2, plain_oracle(RECORDS[33:46], prefix="eval_"))
    for rank in ranks:
        assert rank["on"] == rank["off"]
        assert rank["frozen"] == ranks[0]["frozen"]
        for found, wanted in zip(rank["frozen"], windows, strict=True):
            check(found, wanted)


@two
def accelerate_forgotten(folder: Path) -> Any:
    accelerator = Accelerator(cpu=True)
    model, metrics = accelerator.prepare(tiny_model(attention_dropout=0.0)), ChannelMetrics()
    collate: Any = metrics.collator(PaddingCollator())
    records: Any = RECORDS[:5]
    loader = accelerator.prepare(DataLoader(records, batch_size=2, collate_fn=collate))
    with warnings_of_ours() as warned:
        found = [evaluate(metrics, model, loader, step=1) for _ in range(2)]
    return {"logs": found, "warned": warned}


def test_an_accelerator_that_was_not_given(ranks_of: RanksOf) -> None:
    for rank in ranks_of(accelerate_forgotten):
        (warning,) = rank["warned"]
        assert "Pass `accelerator=` to `evaluate` or `observe`" in warning
        for logs in rank["logs"]:
            # accelerate starts again with the first records.
            check(logs, plain_oracle([*RECORDS[:5], *RECORDS[:3]], prefix="eval_"))


@two
def accelerate_packs(folder: Path) -> Any:
    """An evaluation of one record, which holds two sequences: both ranks have repetitions."""
    accelerator = Accelerator(cpu=True)
    model, metrics = accelerator.prepare(tiny_model()), ChannelMetrics()
    pack: Any = {"input_ids": [1, 2, 3, 4, 5, 6], "position_ids": [0, 1, 2, 0, 1, 2]}
    pack |= {"labels": pack["input_ids"], "channel": ["bbu", "rru"]}

    def in_rows(records: list[Any]) -> dict[str, Any]:
        # One flat row for all records.
        keys = ("input_ids", "labels", "position_ids")
        return {k: torch.tensor([[i for r in records for i in r[k]]]) for k in keys}

    collate: Any = metrics.collator(in_rows)
    packs: Any = [pack]
    loader = accelerator.prepare(DataLoader(packs, batch_size=2, collate_fn=collate))
    try:
        return evaluate(metrics, model, loader, step=1, accelerator=accelerator)
    except ChannelMetricsError as error:
        return str(error)


def test_repeated_packs_cannot_be_told(ranks_of: RanksOf) -> None:
    first, second = ranks_of(accelerate_packs)
    assert "repeats 1 of its 2 records, but holds 4 sequences" in first
    assert "repeats 2 of its 2 records, but holds 4 sequences" in second
