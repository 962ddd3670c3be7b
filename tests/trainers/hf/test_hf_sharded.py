"""FSDP2 and DeepSpeed ZeRO on two ranks: the numbers and the training of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_case_tools import (
    FSDP2,
    channel_values,
    check_bits,
    check_windows,
    fsdp,
    needs_deepspeed,
    run,
    told,
    zero,
    zero_config,
)
from hf_tools import expected_metrics, make_records, tiny_model, token_table
from rank_cases import Case, RanksOf

ZERO: dict[str, Any] = {"use_cpu": False, "ddp_backend": None, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def table() -> dict[tuple[int, ...], Any]:
    records = [*make_records(64), *make_records(10, seed=1)]
    return token_table(tiny_model(attention_dropout=0.0), records)


def check_held_out(ranks: list[Any], table: Any) -> None:
    held_out = [[r["input_ids"] for r in make_records(10, seed=1)]]
    expected = expected_metrics(table, held_out, prefix="eval_")
    for rank in ranks:
        assert channel_values(rank["evaluated"], "eval_") == pytest.approx(expected, rel=1e-5)


@fsdp
def fsdp2(folder: Path) -> Any:
    trainer = run(folder, records=make_records(64), **FSDP2)
    held_out = Dataset.from_list(make_records(10, seed=1))
    return told(trainer, evaluated=trainer.evaluate(held_out), model=type(trainer.model).__name__)


def test_fsdp2_equals_one_process(ranks_of: RanksOf, table: Any) -> None:
    ranks = ranks_of(fsdp2)
    assert {rank["kind"] for rank in ranks} == {"FSDP"}
    assert {rank["model"] for rank in ranks} == {"FSDPQwen2ForCausalLM"}
    check_windows(ranks, table, steps=2, accumulation=1)
    check_held_out(ranks, table)


def _zero(folder: Path, stage: int) -> Any:
    trainer = run(
        folder,
        records=make_records(64),
        deepspeed=zero_config(stage),
        **ZERO,
    )
    held_out = Dataset.from_list(make_records(10, seed=1))
    return told(trainer, evaluated=trainer.evaluate(held_out))


@zero
def zero1(folder: Path) -> Any:
    return _zero(folder, 1)


@zero
def zero2(folder: Path) -> Any:
    return _zero(folder, 2)


@zero
def zero3(folder: Path) -> Any:
    return _zero(folder, 3)


@needs_deepspeed
@pytest.mark.parametrize("case", [zero1, zero2, zero3])
def test_zero_equals_one_process(ranks_of: RanksOf, table: Any, case: Case) -> None:
    ranks = ranks_of(case)
    assert {rank["kind"] for rank in ranks} == {"DEEPSPEED"}
    check_windows(ranks, table, steps=2, accumulation=2)
    check_held_out(ranks, table)


def _bits(folder: Path, metrics_on: bool, **more: Any) -> Any:
    return told(
        run(
            folder,
            records=make_records(64),
            metrics_on=metrics_on,
            dropout=0.1,
            learning_rate=1e-2,
            max_steps=6,
            **{"gradient_accumulation_steps": 2} | more,
        )
    )


@fsdp
def fsdp2_bits_off(folder: Path) -> Any:
    return _bits(folder, False, **FSDP2)


@fsdp
def fsdp2_bits_on(folder: Path) -> Any:
    return _bits(folder, True, **FSDP2)


@zero
def zero2_bits_off(folder: Path) -> Any:
    return _bits(folder, False, deepspeed=zero_config(2), **ZERO)


@zero
def zero2_bits_on(folder: Path) -> Any:
    return _bits(folder, True, deepspeed=zero_config(2), **ZERO)


@pytest.mark.parametrize(
    ("off", "on"),
    [
        (fsdp2_bits_off, fsdp2_bits_on),
        pytest.param(zero2_bits_off, zero2_bits_on, marks=needs_deepspeed),
    ],
)
def test_training_is_bit_identical(ranks_of: RanksOf, off: Case, on: Case) -> None:
    check_bits(ranks_of(off), ranks_of(on))
