"""Gradient shares and entropy in `swift sft`, against one backward pass for each record.

One step is a whole epoch, so the weights are those that the run began with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_tools import gradient_metrics
from rank_cases import Case, RanksOf, case
from swift_files import arguments, make_data, make_model
from swift_tools import SWIFT, both_and_template, needs_swift

from channel_metrics import MetricsConfig
from channel_metrics.core.gradients import GRADIENTS

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)

NAMES = tuple(metric.name for metric in GRADIENTS)
# Not the trainer's own `grad_norm` and `entropy`.
ENDS = tuple(f"_{name}" for name in ("entropy", *NAMES))
CONFIG = MetricsConfig(metrics=("loss", "entropy", *NAMES), live_table=False)
NUM_RECORDS = 24
Found = dict[str, Any]


def trained(folder: Path, **overrides: Any) -> Found:
    """What was logged, with and without our metrics, and what the records give one by one."""
    folder.mkdir()
    model, data = make_model(folder / "model", attention_dropout=0.0), folder / "train.jsonl"
    lines = make_data(folder)["fused"].read_text().splitlines(keepends=True)[:NUM_RECORDS]
    data.write_text("".join(lines))
    one_step = {"gradient_accumulation_steps": NUM_RECORDS, "max_steps": 1}
    options = arguments(model, data, folder, **one_step | overrides)
    found, template = both_and_template(options, CONFIG)
    return found | {"expected": one_by_one(model, template, lines)}


def one_by_one(path: Path, template: Any, lines: list[str]) -> dict[str, float]:
    """The gradient metrics and the entropy of each channel."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double()
    gradients: dict[str, list[list[float]]] = {}
    entropies: dict[str, list[float]] = {}
    for line in lines:
        record = json.loads(line)
        encoded = template.encode({"messages": record["messages"]})
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
        target = torch.tensor(encoded["labels"][1:])
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, model.model.norm.weight)
        name = record["metadata"]["_fusion_source"] or "unlabeled"
        gradients.setdefault(name, []).append(gradient.tolist())
        of_tokens = torch.distributions.Categorical(logits=logits.detach()).entropy()
        entropies.setdefault(name, []).extend(of_tokens[target != -100].tolist())
    values: dict[str, dict[str, float]] = gradient_metrics(gradients)
    for name, own in entropies.items():
        values[name]["entropy"] = sum(own) / len(own)
    return {f"{c}_{metric}": v for c, of in values.items() for metric, v in of.items()}


@alone
def padded(folder: Path) -> Any:
    """ms-swift computes the losses, and only of the last positions of each row."""
    return trained(folder)


@alone
def padding_free(folder: Path) -> Any:
    """The model computes the losses, and only of the supervised positions."""
    return trained(folder, padding_free=True, enable_channel_loss=False)


@alone
def packing(folder: Path) -> Any:
    return trained(folder, packing=True, per_device_train_batch_size=1)


@alone
def all_logits(folder: Path) -> Any:
    return trained(folder, use_logits_to_keep=False)


@pytest.mark.parametrize("of", [padded, padding_free, packing, all_logits])
def test_channels_equal_autograd(ranks_of: RanksOf, of: Case) -> None:
    (found,) = ranks_of(of)
    log = found["on"]["log"][0]
    logged = {key: value for key, value in log.items() if key.endswith(ENDS)}
    assert logged == pytest.approx(found["expected"], rel=1e-4, abs=1e-5)
    assert not [text for text in found["on"]["told"] if "grad_" in text or "entropy" in text]
    assert found["on"]["weights"] == found["off"]["weights"]
