"""The gradient of the last norm per channel in SFTTrainer, against autograd for each sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_tools import gradient_metrics
from transformers import Qwen2ForCausalLM
from trl import SFTTrainer
from trl_sft_tools import BFD, OF_LETTER, MySFT, Seen, sft
from trl_tools import EOS, text_records

from channel_metrics import MetricsConfig
from channel_metrics.core.gradients import GRADIENTS
from channel_metrics.trainers.hf import attach

NAMES = tuple(metric.name for metric in GRADIENTS)
# Not the trainer's own `grad_norm`.
ENDS = tuple(f"_{name}" for name in NAMES)
CONFIG = MetricsConfig(metrics=("loss", *NAMES), live_table=False)


def expected(model: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
    """One backward pass for each sequence; its channel is read from its letters."""
    exact = Qwen2ForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    found: dict[str, list[list[float]]] = {}
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"]
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 0] = True
        if "position_ids" in batch and "attention_mask" not in batch:
            starts = batch["position_ids"] == 0
        owner = starts.flatten().cumsum(0).view_as(ids)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = exact(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        for number in owner.unique().tolist():
            own = labels.masked_fill((owner != number) | starts, -100)[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, own, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, exact.model.norm.weight, retain_graph=True)
            (letter,) = {OF_LETTER[t] for t in own[(own >= 0) & (own != EOS)].tolist()}
            found.setdefault(letter, []).append(gradient.tolist())
    values = gradient_metrics(found)
    return {f"{c}_{metric}": v for c, of in values.items() for metric, v in of.items()}


@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [
        (SFTTrainer, {}),
        (SFTTrainer, {"padding_free": True, "max_length": None}),
        (MySFT, {"packing": True, "packing_strategy": BFD}),
    ],
    ids=["padded", "padding-free", "packed"],
)
def test_channels_equal_autograd(
    tmp_path: Path, trainer_class: Any, options: dict[str, Any]
) -> None:
    seen = Seen()
    if trainer_class is MySFT:
        options["channel_metrics"] = CONFIG
    else:
        options["prepare"] = lambda trainer: attach(trainer, CONFIG)
    given = {"learning_rate": 0.0, "max_steps": 1, "logging_steps": 1, "before": seen, **options}
    trainer = sft(tmp_path, trainer_class, text_records(32), **given)
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    found = {key: value for key, value in log.items() if key.endswith(ENDS)}
    batches = seen.batches[True]
    assert len(batches) == 2
    assert found == pytest.approx(expected(trainer.model, batches), rel=1e-4, abs=1e-5)
    assert not trainer.channel_metrics.warned
