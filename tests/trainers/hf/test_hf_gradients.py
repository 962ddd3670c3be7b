"""The gradient of the last norm per channel in the HF Trainer: on one, two, and cut in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from gradient_tools import gradient_metrics
from hf_case_tools import (
    FSDP2,
    check_bits,
    counted_collectives,
    ddp,
    fixed_records,
    fsdp,
    needs_deepspeed,
    run,
    run_for_bits,
    told,
    zero,
    zero_config,
)
from hf_tools import PaddingCollator, channel_logs, make_records, tiny_model
from peft import LoraConfig, get_peft_model
from rank_cases import RanksOf
from test_hf_parallel import Unpadded, _attention_over_ranks
from transformers import DataCollatorWithFlattening
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from channel_metrics import MetricsConfig
from channel_metrics.core.gradients import GRADIENTS

NAMES = tuple(metric.name for metric in GRADIENTS)
CONFIG = MetricsConfig(metrics=("loss", *NAMES))


def expected(records: list[Any], steps: list[list[Any]], scale: float = 1.0) -> dict[str, float]:
    """Of a window whose steps trained on these lists of token ids; one backward per record."""
    model: Any = tiny_model(attention_dropout=0.0).double()
    known = {tuple(record["input_ids"]): record for record in records}
    found: dict[str, list[list[float]]] = {}
    for step in steps:
        batch = [known[tuple(ids)] for ids in step]
        count = sum(label != -100 for record in batch for label in record["labels"][1:])
        for record in batch:
            ids, labels = (torch.tensor([record[key]]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
            (gradient,) = torch.autograd.grad(nll / count, model.model.norm.weight)
            found.setdefault(record["channel"] or "unlabeled", []).append(gradient.tolist())
    values = gradient_metrics(found)
    return {f"{c}_{metric}": v for c, of in values.items() for metric, v in of.items()}


def gradients(log: dict[str, float], *left_out: str) -> dict[str, float]:
    ends = tuple(f"_{name}" for name in NAMES if name not in left_out)
    return {key: value for key, value in log.items() if key.endswith(ends)}


@pytest.mark.parametrize("collator", [PaddingCollator(), DataCollatorWithFlattening()])
def test_one_process(tmp_path: Path, collator: Any) -> None:
    """Two micro-batches make a step, and one step a window."""
    records = make_records(8)
    trainer = run(
        tmp_path,
        config=CONFIG,
        records=records,
        collator=collator,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        ddp_backend=None,
    )
    (log,) = channel_logs(trainer)
    step = [[record["input_ids"] for record in records]]
    assert gradients(log) == pytest.approx(expected(records, step), rel=1e-4, abs=1e-5)
    assert not trainer.channel_metrics.warned


@ddp
def two_ranks(folder: Path) -> Any:
    with counted_collectives() as windows:
        trainer = run(folder, config=CONFIG, records=make_records(64))
    # The first one agrees on columns and names. Later, gradients travel with the other sums.
    assert windows == [["all_reduce"] * 2, ["all_reduce"], ["all_reduce"]]
    return told(trainer)


@zero
def zero2(folder: Path) -> Any:
    given: dict[str, Any] = {"use_cpu": False, "ddp_backend": None}
    given["deepspeed"] = zero_config(2)
    return told(run(folder, config=CONFIG, records=make_records(64), **given))


@pytest.mark.parametrize("case", [two_ranks, pytest.param(zero2, marks=needs_deepspeed)])
def test_two_ranks_equal_one_process(ranks_of: RanksOf, case: Any) -> None:
    ranks = ranks_of(case)
    steps = [a + b for a, b in zip(*(rank["batches"] for rank in ranks), strict=True)]
    for rank in ranks:
        logs = [entry for entry in rank["logs"] if "loss" in entry]
        assert len(logs) == 2 and not rank["warned"]
        for log, own in zip(logs, (steps[:2], steps[2:4]), strict=True):
            of_window = expected(make_records(64), own)
            assert gradients(log) == pytest.approx(of_window, rel=1e-4, abs=1e-5)


@fsdp
def context_parallel(folder: Path) -> Any:
    """Both ranks train on halves of the same rows, and the model is sharded."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention_over_ranks
    trainer = run(
        folder,
        config=CONFIG,
        records=fixed_records(32),
        collator=Unpadded(),
        model=tiny_model(attention_dropout=0.0, attn_implementation="sdpa"),
        parallelism_config=ParallelismConfig(cp_size=2),
        **FSDP2,
    )
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    return told(trainer)


def test_parts_of_rows_add_up_without_a_noise_scale(ranks_of: RanksOf) -> None:
    for rank in ranks_of(context_parallel):
        logs = [entry for entry in rank["logs"] if "loss" in entry]
        assert len(logs) == 2
        for log, own in zip(logs, (rank["batches"][:2], rank["batches"][2:4]), strict=True):
            of_window = gradients(expected(fixed_records(32), own), "grad_noise")
            assert gradients(log) == pytest.approx(of_window, rel=1e-4, abs=1e-5)


@ddp
def bits_off(folder: Path) -> Any:
    return run_for_bits(folder, False)


@ddp
def bits_on(folder: Path) -> Any:
    return run_for_bits(folder, True, config=CONFIG)


def test_the_training_is_the_same_bit_for_bit(ranks_of: RanksOf) -> None:
    on = ranks_of(bits_on)
    check_bits(ranks_of(bits_off), on)
    assert any("bbu_grad_share" in entry for entry in on[0]["logs"])
    assert not any(key.startswith("eval_") and "grad" in key for key in on[0]["logs"][-1])


# peft reads it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_peft(tmp_path: Path) -> None:
    """The layer is frozen. Its gradient is measured all the same."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny_model(attention_dropout=0.0), adapter)
    records = make_records(4)
    given: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "ddp_backend": None}
    (log,) = channel_logs(run(tmp_path, model=model, config=CONFIG, records=records, **given))
    step = [[record["input_ids"] for record in records]]
    assert gradients(log) == pytest.approx(expected(records, step), rel=1e-4, abs=1e-5)
