"""One epoch of the transformers Trainer on the mixture. It knows nothing of channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

FOLDER = Path("runs/one_mixture")
tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")


def encode(record: dict[str, Any]) -> dict[str, list[int]]:
    """Token ids; the loss is on the answer."""
    *before, _ = record["messages"]
    prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
    ids, answer = (tokenizer(part)["input_ids"] for part in (prompt, text[len(prompt) :]))
    return {"input_ids": ids + answer, "labels": [-100] * len(ids) + answer}


records = load_dataset("json", data_files=str(FOLDER / "mixture.jsonl"), split="train")
Trainer(
    AutoModelForCausalLM.from_pretrained(FOLDER / "model"),
    TrainingArguments(
        output_dir=str(FOLDER / "hf"),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="epoch",
    ),
    train_dataset=records.map(encode),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
).train()
