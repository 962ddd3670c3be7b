"""What the cases on several ranks share: a run, its records, and what is told about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from hf_tools import PaddingCollator, Record, make_records, tiny_model, train
from transformers import Trainer

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.hf import state as hf_state

# A model that two tensor parallel ranks can divide evenly.
TP_SIZES: dict[str, Any] = {"attention_dropout": 0.0, "num_key_value_heads": 2, "vocab_size": 62}
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
)


def fixed_records(count: int, seed: int = 0, width: int = 16, **arguments: Any) -> list[Record]:
    """Records of one width: what one process sends to the others must be concatenated."""
    records = make_records(count, seed=seed, **arguments)
    for record in records:
        pads = width + 1 - len(record["input_ids"])
        record["input_ids"] = (record["input_ids"] + [0] * pads)[:width]
        record["attention_mask"] = (record["attention_mask"] + [0] * pads)[:width]
        record["labels"] = (record["labels"] + [-100] * pads)[:width]
    return records


class MapStyle(torch.utils.data.Dataset):
    """A dataset that cannot be scanned: names are met on the way."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


class Stream(torch.utils.data.IterableDataset):
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
) -> Trainer:
    """A training on these ranks, by default with a learning rate of 0."""

    def make_ready(trainer: Trainer) -> None:
        if metrics_on:
            attach(trainer, config or MetricsConfig())
        if prepare is not None:
            prepare(trainer)

    return train(
        folder,
        prepare=make_ready,
        model=arguments.pop("model", None) or tiny_model(attention_dropout=dropout),
        **{"learning_rate": 0.0, "ddp_backend": "gloo"} | arguments,
        trainer_arguments={"data_collator": collator or PaddingCollator()}
        | (trainer_arguments or {}),
    )


def told(trainer: Trainer, **more: Any) -> dict[str, Any]:
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

    def wrap(name: str, original: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                windows[-1].append(name)
            return original(*args, **kwargs)

        return called

    sync = hf_state.sync

    def watched(*args: Any, **kwargs: Any) -> Any:
        windows.append([])
        inside[0] = True
        try:
            return sync(*args, **kwargs)
        finally:
            inside[0] = False

    wrapped = {name: wrap(name, getattr(dist, name)) for name in COLLECTIVES}
    with patch.multiple(dist, **wrapped), patch.object(hf_state, "sync", watched):
        yield windows


def cases_of(module: dict[str, Any]) -> list[Callable[[Path], Any]]:
    """The functions that a module itself defines, in order, without the private ones."""
    return [
        value
        for name, value in module.items()
        if isinstance(value, FunctionType)
        and value.__module__ == module["__name__"]
        and not name.startswith("_")
    ]
