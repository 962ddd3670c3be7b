"""The Seq2SeqTrainer with an encoder-decoder model: its losses are not shifted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_tools import VOCABULARY, PaddingCollator, Record, channel_logs, make_records
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from channel_metrics.trainers.hf import attach


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    make_config: Any = T5Config
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        make_config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    )


def t5_metrics(model: torch.nn.Module, records: list[Record], prefix: str) -> dict[str, float]:
    """{key: loss or tokens} of each channel, by a forward pass of the whole set."""
    batch = PaddingCollator()(records)
    with torch.no_grad():
        log_probs = model.eval()(**batch).logits.double().log_softmax(-1)
    expected: dict[str, float] = {}
    for name in {record["channel"] for record in records}:
        rows = [row for row, record in enumerate(records) if record["channel"] == name]
        nll = [
            -float(log_probs[row, position, label])
            for row in rows
            for position, label in enumerate(batch["labels"][row].tolist())
            if label != -100
        ]
        expected[f"{prefix}{name}_loss"] = sum(nll) / len(nll)
        expected[f"{prefix}{name}_tokens"] = len(nll)
    return expected


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
@pytest.mark.parametrize("generate", [False, True])
def test_seq2seq_trainer(tmp_path: Path, generate: bool) -> None:
    records, held_out = make_records(16), make_records(10, seed=1)
    model = t5()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=generate,
        generation_max_length=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=0.0,
        max_steps=4,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = attach(
        Seq2SeqTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(records),
            eval_dataset=Dataset.from_list(held_out),
            data_collator=PaddingCollator(),
        )
    )
    trainer.train()
    entries = [channel_logs(trainer)[0], trainer.evaluate()]
    for entry, part, prefix in zip(entries, (records, held_out), ("", "eval_"), strict=True):
        for key, value in t5_metrics(model, part, prefix).items():
            assert entry[key] == pytest.approx(value, rel=1e-5)
