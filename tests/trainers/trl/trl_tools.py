"""Text records whose tokens tell their channel, tiny models, and runs of TRL's trainers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments, set_seed

from channel_metrics.demo.tiny import byte_tokenizer

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Disjoint letters: which channel a token is of can be read from the token.
ALPHABETS = {"bbu": "abcdef", "rru": "ghijkl", "lvis": "mnopqr", "lang_chat": "stuvwx"}
CHANNELS = tuple(ALPHABETS)
EOS = 257

# TRL turns it on; transformers has renamed it.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)

Record = dict[str, Any]


def word(rng: random.Random, channel: str, low: int = 2, high: int = 17) -> str:
    return "".join(rng.choice(ALPHABETS[channel]) for _ in range(rng.randint(low, high)))


def text_records(count: int, seed: int = 0) -> list[Record]:
    rng = random.Random(seed)
    names = [rng.choice(CHANNELS) for _ in range(count)]
    return [{"text": word(rng, name), "channel": name} for name in names]


def token_records(count: int, seed: int = 0) -> list[Record]:
    """Tokenised already, and without an end of text: a cut piece still tells its channel."""
    return [
        {"input_ids": list(record["text"].encode()), "channel": record["channel"]}
        for record in text_records(count, seed)
    ]


def pair_records(count: int, seed: int = 0) -> list[Record]:
    rng = random.Random(seed)
    names = [rng.choice(CHANNELS) for _ in range(count)]
    return [
        {
            "prompt": word(rng, name, 2, 6),
            "chosen": word(rng, name, 2, 9),
            "rejected": word(rng, name, 2, 9),
            "channel": name,
        }
        for name in names
    ]


def sizes(**overrides: Any) -> dict[str, Any]:
    return {
        "vocab_size": 260,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 256,
        "eos_token_id": EOS,
        "initializer_range": 0.5,
        **overrides,
    }


def tiny_model(seed: int = 0, **overrides: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**sizes(**overrides)))


def arguments(folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        CHECKPOINTING: False,
        **overrides,
    }


def run(
    trainer_class: Any,
    config: Any,
    records: Any,
    *,
    model: Any = None,
    prepare: Callable[[Any], object] | None = None,
    before: Callable[[Any], object] | None = None,
    **keywords: Any,
) -> Any:
    """Make a trainer, let `prepare` (say `attach`) and `before` see it, train, and return it."""
    set_seed(0)
    trainer = trainer_class(
        model=tiny_model() if model is None else model,
        args=config,
        train_dataset=Dataset.from_list(records) if isinstance(records, list) else records,
        processing_class=byte_tokenizer(),
        **keywords,
    )
    for step in (prepare, before):
        if step is not None:
            step(trainer)
    trainer.train()
    return trainer


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logs(trainer: Any, prefix: str = "") -> list[dict[str, float]]:
    """The log entries that carry channel metrics, those keys only, in order."""
    starts = tuple(f"{prefix}{name}_" for name in (*CHANNELS, "unlabeled"))
    picked = [
        {key: value for key, value in entry.items() if key.startswith(starts)}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in picked if entry]


def windows(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
