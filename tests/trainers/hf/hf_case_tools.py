"""What the cases on several ranks share: a run, its records, and what is told about it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import faults
import pytest
import torch
import torch.distributed as dist
from collectives import watched
from datasets import Dataset
from fork_client import Preload
from hf_tools import PaddingCollator, Record, expected_metrics, make_records, tiny_model, train
from rank_cases import case
from transformers import Trainer

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach

HF = Preload(("hf_case_tools",))
# Decorators of cases: how many ranks there are, and of what kind.
ddp = case(HF, ranks=2)
ddp4 = case(HF, ranks=4)
fsdp = case(HF, ranks=2, setup="hf_fsdp:use_cpu")
zero = case(HF, ranks=2, setup="hf_deepspeed:use_cpu")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is only in the main environment (Python 3.11), which runs this",
)

FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
}
COUNTS = MetricsConfig(
    channels=("bbu", "rru", "lvis", "lang_chat"),
    unknown="error",
    metrics=("loss", "tokens", "samples"),
)
DISPATCH = {"dispatch_batches": True}
NO_DISPATCH = {"dispatch_batches": False}
SPLIT = {"split_batches": True}
# A model that two tensor parallel ranks can divide evenly.
TP_SIZES: dict[str, Any] = {"attention_dropout": 0.0, "num_key_value_heads": 2, "vocab_size": 62}


def fixed_records(count: int, seed: int = 0, width: int = 16, **arguments: Any) -> list[Record]:
    """Records of one width: what one process sends to the others must be concatenated."""
    records = make_records(count, seed=seed, **arguments)
    for record in records:
        pads = width + 1 - len(record["input_ids"])
        record["input_ids"] = (record["input_ids"] + [0] * pads)[:width]
        record["attention_mask"] = (record["attention_mask"] + [0] * pads)[:width]
        record["labels"] = (record["labels"] + [-100] * pads)[:width]
    return records


class MapStyle(torch.utils.data.Dataset[Any]):
    """A dataset that cannot be scanned: names are met on the way."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


class Stream(torch.utils.data.IterableDataset[Any]):
    """A stream that divides itself over its workers."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def __iter__(self) -> Iterator[Record]:
        worker = torch.utils.data.get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from self.records[start::step]


def run(
    folder: Path,
    *,
    config: MetricsConfig | None = None,
    metrics_on: bool = True,
    dropout: float = 0.0,
    collator: Any = None,
    trainer_arguments: dict[str, Any] | None = None,
    prepare: Callable[[Trainer], object] | None = None,
    **arguments: Any,
) -> Any:
    """A training on these ranks, by default with a learning rate of 0."""

    def make_ready(trainer: Trainer) -> None:
        if metrics_on:
            attach(trainer, config or MetricsConfig())
        if prepare is not None:
            prepare(trainer)

    model = arguments.pop("model", None) or tiny_model(attention_dropout=dropout)
    given: dict[str, Any] = {"learning_rate": 0.0, "ddp_backend": "gloo", **arguments}
    return train(
        folder,
        prepare=make_ready,
        model=model,
        **given,
        trainer_arguments={"data_collator": collator or PaddingCollator()}
        | (trainer_arguments or {}),
    )


def told(trainer: Any, **more: Any) -> dict[str, Any]:
    """Logs, the batches that this rank's collator saw, warnings, and a hash of the weights."""
    state = getattr(trainer, "channel_metrics", None)
    return {
        "logs": trainer.state.log_history,
        "batches": getattr(trainer.data_collator, "batches", []),
        "warned": sorted(state.warned) if state else [],
        "kind": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "weights": weights_hash(trainer.model),
        **more,
    }


def weights_hash(model: torch.nn.Module) -> str:
    """Of the parameters this rank holds, bit for bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        shard = getattr(parameter, "ds_tensor", local)
        digest.update(shard.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def counted_collectives() -> Iterator[list[list[str]]]:
    """The collectives that each `sync` of the Trainer's windows called, in order."""
    windows: list[list[str]] = []
    inside = [False]

    def tell(name: str, *_: Any, **__: Any) -> None:
        if inside[0]:
            windows[-1].append(name)

    def inside_of(sync: Any, *args: Any, **kwargs: Any) -> Any:
        windows.append([])
        inside[0] = True
        try:
            return sync(*args, **kwargs)
        finally:
            inside[0] = False

    with patch.multiple(dist, **watched(tell)), faults.around("sum over ranks", inside_of):
        yield windows


def zero_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    }


def channel_values(entry: dict[str, float], prefix: str = "") -> dict[str, float]:
    names = tuple(f"{prefix}{name}_" for name in ("bbu", "rru", "lvis", "lang_chat", "unlabeled"))
    return {key: value for key, value in entry.items() if key.startswith(names)}


def check_windows(ranks: list[Any], table: Any, *, steps: int, accumulation: int) -> None:
    """Windows of `steps` steps equal the oracle on what the ranks saw together."""
    for rank in ranks:
        assert rank["processes"] == len(ranks)
        assert not rank["warned"]
        logs = [entry for entry in rank["logs"] if "loss" in entry]
        assert len(logs) >= 2
        for index, entry in enumerate(logs):
            start, end = (edge * steps * accumulation for edge in (index, index + 1))
            seen = [batch for other in ranks for batch in other["batches"][start:end]]
            assert channel_values(entry) == pytest.approx(expected_metrics(table, seen), rel=1e-5)


def run_for_bits(folder: Path, metrics_on: bool, **more: Any) -> Any:
    """A training with all that could be disturbed: dropout, accumulation, evaluations."""
    held_out = Dataset.from_list(make_records(10, seed=1))
    trainer = run(
        folder,
        metrics_on=metrics_on,
        dropout=0.1,
        learning_rate=1e-2,
        max_steps=8,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        trainer_arguments={"eval_dataset": held_out},
        **more,
    )
    off = metrics_on and trainer.channel_metrics.guard.off
    return told(trainer, random=torch.get_rng_state().sum().item(), off=off)


def check_bits(off: list[Any], on: list[Any]) -> None:
    """Metrics changed nothing of a training, and there were some."""
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "train_loss", "step")
    for rank_off, rank_on in zip(off, on, strict=True):
        assert rank_off["weights"] == rank_on["weights"]
        assert rank_off.get("random") == rank_on.get("random")
        kept = [[{k: e[k] for k in keys if k in e} for e in r["logs"]] for r in (rank_off, rank_on)]
        assert kept[0] == kept[1]
        assert any("bbu_loss" in entry for entry in rank_on["logs"])
        assert not any("bbu_loss" in entry for entry in rank_off["logs"])
    untrained = tiny_model(attention_dropout=0.1)
    assert on[0]["weights"] != weights_hash(untrained)
