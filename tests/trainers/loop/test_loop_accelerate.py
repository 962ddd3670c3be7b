"""A loop of one's own with accelerate, on two real processes and on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from hf_case_tools import COLLECTIVES, HF
from hf_tools import PaddingCollator, tiny_model
from loop_tools import RECORDS, check, model_loss, on_and_off, plain_oracle
from rank_cases import Case, RanksOf, case
from said import warnings_of_ours
from torch.utils.data import DataLoader

from channel_metrics import ChannelMetrics, ChannelMetricsError, evaluate, swap

two, one = case(HF, ranks=2), case(HF, ranks=1)


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
def accelerate_collectives(folder: Path) -> Any:
    """For a run without metrics and one with: the collectives of each step and of each window."""
    found: list[dict[str, list[list[str]]]] = []
    for metrics in (None, ChannelMetrics()):
        accelerator = Accelerator(cpu=True)
        collate: Any = metrics.collator(PaddingCollator()) if metrics else PaddingCollator()
        records: Any = RECORDS[:32]
        loader: Any = DataLoader(records, batch_size=4, collate_fn=collate)
        model, loader = accelerator.prepare(tiny_model(), loader)
        steps, windows = [], []
        with called_collectives() as calls:
            for number, batch in enumerate(loader, start=1):
                accelerator.backward(model_loss(metrics, model, batch))
                steps.append(calls.copy())
                calls.clear()
                if metrics is not None:
                    metrics.close(number)
                    windows.append(calls.copy())
                    calls.clear()
        found.append({"steps": steps, "windows": windows})
    return found


@contextmanager
def called_collectives() -> Iterator[list[str]]:
    """The names of the collectives that Python calls, in order."""
    calls: list[str] = []

    def counting(original: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(original.__name__)
        return original(*args, **kwargs)

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(swap.wrapped(dist, name, counting))
        yield calls


def test_a_window_is_one_collective_and_a_step_none(ranks_of: RanksOf) -> None:
    for off, on in ranks_of(accelerate_collectives):
        assert on["steps"] == off["steps"] and len(on["steps"]) == 4
        first, *others = on["windows"]
        assert len(first) <= 4, "the ranks agree on names"
        assert others[-1] == ["all_reduce"]


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
