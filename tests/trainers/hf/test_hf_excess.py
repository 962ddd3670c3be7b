"""`excess_loss` in the HF Trainer, padded and padding-free, in training and in an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_tools import PaddingCollator, make_records, tiny_model, token_table, train
from transformers import DataCollatorWithFlattening

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach

Record = dict[str, Any]


def with_reference(records: list[Record]) -> list[Record]:
    return [
        record | {"ref_nll": 1.7 * number, "ref_tokens": sum(t != -100 for t in record["labels"])}
        for number, record in enumerate(records)
    ]


def excess(model: Any, records: list[Record], prefix: str = "") -> dict[str, float]:
    """The model's nll, one record at a time, and the numbers of the records."""
    table, sums = token_table(model, records), dict[str, list[float]]()
    for record in records:
        nlls = [nll for nll, _ in table[tuple(record["input_ids"])][1]]
        of_channel = sums.setdefault(record["channel"], [0.0, 0.0])
        of_channel[0] += sum(nlls) - record["ref_nll"]
        of_channel[1] += len(nlls)
    return {f"{prefix}{name}_excess_loss": off / size for name, (off, size) in sums.items()}


@pytest.mark.parametrize("collator", [PaddingCollator, DataCollatorWithFlattening])
def test_against_a_loop_over_the_records(tmp_path: Path, collator: Any) -> None:
    records, held = (with_reference(make_records(16, seed)) for seed in (0, 1))
    trainer = train(
        tmp_path,
        prepare=lambda trainer: attach(trainer, MetricsConfig(metrics=("excess_loss",))),
        model=tiny_model(attention_dropout=0.0),
        records=records,
        trainer_arguments={"data_collator": collator(), "eval_dataset": Dataset.from_list(held)},
        learning_rate=0.0,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=4,
    )
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        found |= {key: value for key, value in entry.items() if key.endswith("excess_loss")}
    wanted = excess(trainer.model, records) | excess(trainer.model, held, "eval_")
    assert found == pytest.approx(wanted, rel=1e-5)
