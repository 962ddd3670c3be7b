"""Bits per byte in the HF Trainer and in a loop: the tokenizer and the targets get to the sums."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from channel_metrics import ChannelMetrics, ConfigError, MetricsConfig
from channel_metrics.trainers.hf import attach

CONFIG = MetricsConfig(metrics=("loss", "bits_per_byte", "bits_per_char"), live_table=False)
TEXTS = {"a": "naïve 東京", "b": "plain text"}
PROMPT = 2


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a special one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {character: i for i, character in enumerate(alphabet, 1)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=300, **sizes))


def records() -> list[dict[str, Any]]:
    found = []
    for channel, text in TEXTS.items():
        ids = [*tokenizer().encode(text), 0]
        labels = [-100] * PROMPT + ids[PROMPT:]
        found.append({"input_ids": ids, "labels": labels, "channel": channel})
    return found


def expected() -> dict[str, float]:
    """By one forward per record: special tokens do not count, and the text is that of a decode."""
    found = {}
    for record in records():
        ids = torch.tensor([record["input_ids"]])
        with torch.no_grad():
            logits = model().double()(ids).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        text: Any = tokenizer().decode(record["input_ids"][PROMPT:-1])
        bits = float(nll[PROMPT - 1 : -1].sum()) / math.log(2)
        found[f"{record['channel']}_bits_per_byte"] = bits / len(text.encode())
        found[f"{record['channel']}_bits_per_char"] = bits / len(text)
    return found


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(record["input_ids"]) for record in batch)
    return {
        key: torch.tensor([r[key] + [pad] * (width - len(r[key])) for r in batch])
        for key, pad in (("input_ids", 0), ("labels", -100))
    }


def trainer(folder: Path, **given: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
    )
    data: Any = records()
    return Trainer(model(), arguments, collate, data, **given)


def text_values(logs: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in logs.items() if "_bits_per_" in key}


def test_the_trainer_knows_its_tokenizer(tmp_path: Path) -> None:
    found = attach(trainer(tmp_path, processing_class=tokenizer()), CONFIG)
    found.train()
    log = next(entry for entry in found.state.log_history if "a_loss" in entry)
    assert text_values(log) == pytest.approx(expected(), rel=1e-5)


def test_a_loop_gives_it(tmp_path: Path) -> None:
    """Its batch is packed: targets move to their positions with the losses."""
    metrics = ChannelMetrics(CONFIG)
    metrics.read_tokenizer(tokenizer())
    collator = metrics.collator(collate)
    for record in records():
        batch = collator([record])
        with metrics.observe(module := model(), batch):
            module(**batch)
    assert text_values(metrics.close(1).logs) == pytest.approx(expected(), rel=1e-5)
    for record in records():
        batch = collator([record])
        with metrics.observe(module := model(), batch) as seen:
            seen.logits(module(input_ids=batch["input_ids"]).logits)
    assert text_values(metrics.close(2).logs) == pytest.approx(expected(), rel=1e-5)


def test_a_tokenizer_that_cannot_tell_is_refused_at_the_start(tmp_path: Path) -> None:
    state = json.loads(tokenizer().backend_tokenizer.to_str()) | {"decoder": None}
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(ConfigError, match="say where spaces are"):
        attach(trainer(tmp_path, processing_class=odd), CONFIG)
