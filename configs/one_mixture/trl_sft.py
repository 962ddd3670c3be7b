"""One epoch of TRL's SFTTrainer on the mixture. It knows nothing of channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

FOLDER = Path("runs/one_mixture")


def split(record: dict[str, Any]) -> dict[str, Any]:
    """A conversation with one answer, in the form in which TRL trains on the answer alone."""
    return {"prompt": record["messages"][:-1], "completion": record["messages"][-1:]}


records = load_dataset("json", data_files=str(FOLDER / "mixture.jsonl"), split="train")
SFTTrainer(
    str(FOLDER / "model"),
    SFTConfig(
        output_dir=str(FOLDER / "trl"),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=5e-5,  # that of the Trainer
        bf16=False,
        logging_steps=1,
        report_to="none",
        save_strategy="epoch",
    ),
    train_dataset=records.map(split, remove_columns="messages"),
).train()
