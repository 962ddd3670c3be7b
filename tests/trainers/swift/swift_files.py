"""A tiny model, data and arguments for runs of ms-swift; without ms-swift itself."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from channel_metrics.demo.tiny import byte_tokenizer

CHANNELS = ("bbu", "rru", "lvis", "lang_chat")


def make_model(folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """A Qwen2 with random weights and the byte tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    given: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "initializer_range": 0.3,
        "attention_dropout": 0.1,
    }
    Qwen2ForCausalLM(Qwen2Config(**(given | sizes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(folder: Path) -> dict[str, Path]:
    """The same conversations with the channel in a column, in `metadata`, beside a worse answer,
    and as texts alone; and others with words that `--loss_scale react` weights."""
    rng = random.Random(0)
    plain, fused, react = [], [], []
    for index in range(96):
        channel = CHANNELS[rng.randrange(4)]
        words = " ".join(rng.choices(["see", "go", channel], k=rng.randint(1, 6)))
        answer = f"Thought: {words}\nAction: {rng.choice(['see', 'go'])}\nFinal Answer: {index}"
        messages = [{"role": "user", "content": f"{channel} {index}"}]
        plain.append({"messages": [*messages, said(words)], "channel": channel})
        react.append({"messages": [*messages, said(answer)], "channel": channel})
        source = None if index % 7 == 0 else channel
        domain = ("target", "source", None)[index % 3]
        metadata = {"_fusion_source": source, "_fusion_domain": domain, "index": index}
        fused.append({"messages": [*messages, said(words)], "metadata": metadata})
    paths = {}
    for name, records in (("plain", plain), ("fused", fused), ("react", react)):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs = [record | {"rejected_response": "no"} for record in plain]
    paths["pairs"] = folder / "pairs.jsonl"
    paths["pairs"].write_text("".join(json.dumps(record) + "\n" for record in pairs))
    texts = [{"messages": [r["messages"][1]], "channel": r["channel"]} for r in plain]
    paths["texts"] = folder / "texts.jsonl"
    paths["texts"].write_text("".join(json.dumps(record) + "\n" for record in texts))
    return paths


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def arguments(model: Path, data: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    given = {
        "model": str(model),
        "model_type": "qwen2",
        "template": "qwen2_5",
        "dataset": [str(data)],
        "tuner_type": "full",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "use_cpu": True,
        "use_hf": True,
        "check_model": False,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "split_dataset_ratio": 0,
        "output_dir": str(folder),
        "add_version": False,
        "report_to": ["none"],
        "save_strategy": "no",
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "max_length": 256,
        "enable_channel_loss": True,
    }
    return given | overrides


_shared: dict[str, Any] = {}


def given(folder: Path, data: str = "plain", **overrides: Any) -> dict[str, Any]:
    """`arguments` for a run on one process; all cases of a file share a model and data."""
    paths = shared_data(folder)
    return arguments(_shared["model"], paths[data], folder, **overrides)


def shared_data(folder: Path) -> dict[str, Path]:
    if not _shared:
        base = folder.parent / f"shared{os.getpid()}"
        base.mkdir(parents=True)
        _shared.update(model=make_model(base / "model"), data=make_data(base))
    paths: dict[str, Path] = _shared["data"]
    return paths


def ranks_given(
    folder: Path, data: str = "plain", heads: int = 2, **overrides: Any
) -> dict[str, Any]:
    """`arguments` for a run on several ranks, which share models and data.

    heads: the key-value heads of the model.
    """
    if not _shared:
        base = folder.parent / f"shared{os.getppid()}"
        base.mkdir(exist_ok=True)
        if dist.get_rank() == 0:
            make_data(base)
        for count in (1, 2):
            # transformers saves on the first rank only.
            make_model(base / f"model{count}", num_key_value_heads=count)
        dist.barrier()
        _shared["base"] = base
    base = _shared["base"]
    gloo = {"ddp_backend": "gloo"}
    return arguments(base / f"model{heads}", base / f"{data}.jsonl", folder, **gloo | overrides)
