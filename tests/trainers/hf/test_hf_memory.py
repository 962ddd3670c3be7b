"""Token losses and accuracy hold no memory beside what the step has already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_tools import CHANNELS, PaddingCollator, make_records, tiny_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from benchmarks.timing import peak_mib
from channel_metrics.config import MetricsConfig
from channel_metrics.trainers.hf import attach

# Wide enough that the logits are nearly all there is.
VOCABULARY = 8_192


def peak_of_a_step(folder: Path, collator: Any, *, metrics: bool) -> tuple[float, float]:
    """MiB at the peak of the second step, and MiB of one tensor as large as its logits."""
    trainer: Any = Trainer(
        tiny_model(vocab_size=VOCABULARY),
        TrainingArguments(
            str(folder), use_cpu=True, report_to=[], per_device_train_batch_size=8, seed=3
        ),
        train_dataset=Dataset.from_list(make_records(16)),
        data_collator=collator,
    )
    if metrics:
        attach(trainer, MetricsConfig(channels=CHANNELS))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    batches = list(trainer.get_train_dataloader())

    def step(batch: dict[str, Any]) -> None:
        num_items = (batch["labels"][:, 1:] != -100).sum()
        trainer.training_step(trainer.model, dict(batch), num_items)
        trainer.model.zero_grad()

    for batch in batches:
        step(batch)
    logits = batches[-1]["labels"].numel() * VOCABULARY * 4 / 2**20
    return peak_mib(lambda: step(batches[-1])), logits


@pytest.mark.parametrize("flat", [False, True])
def test_the_peak_of_a_step_is_what_it_was(flat: bool, tmp_path: Path) -> None:
    def collator() -> Any:
        return DataCollatorWithFlattening() if flat else PaddingCollator()

    without, logits = peak_of_a_step(tmp_path, collator(), metrics=False)
    with_metrics, same_logits = peak_of_a_step(tmp_path, collator(), metrics=True)
    assert logits == same_logits and without > 2 * logits
    # A few values per token: less than a hundredth of one more tensor of logits.
    assert abs(with_metrics - without) < logits / 100


def test_one_more_tensor_would_be_seen() -> None:
    def step(copies: int) -> float:
        return peak_mib(lambda: [torch.ones(2**18) for _ in range(copies)])

    assert step(2) - step(1) == pytest.approx(1, abs=1e-3)
