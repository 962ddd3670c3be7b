"""What a probe must log, by a naive loop; and a model that a careless probe would disturb."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf_tools import VOCABULARY, Record, make_records, token_table, train
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback

from channel_metrics.core.intervals import student_t
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.hf.probe import DatasetMetricsCallback

EVAL_BATCH_SIZE = 4  # of `hf_tools.train`
CANARY = make_records(7, seed=11)
HELD_OUT = make_records(30, seed=12)


def probe_of(**options: Any) -> DatasetMetricsCallback:
    sources = options.pop("sources", {"canary": CANARY, "held_out": HELD_OUT})
    return DatasetMetricsCallback(
        sources, **{"every": 2, "batches": 2, "max_overhead": None} | options
    )


def add(trainer: Trainer, callback: TrainerCallback, *, told: bool = True) -> None:
    """Add a callback; a probe is told its trainer, unless it is left to the channel metrics."""
    if told and isinstance(callback, DatasetMetricsCallback):
        callback.trainer = trainer
    trainer.add_callback(callback)


def run(
    folder: Path,
    *callbacks: TrainerCallback,
    metrics_on: bool = False,
    **arguments: Any,
) -> Any:
    def prepare(trainer: Trainer) -> None:
        if metrics_on:
            attach(trainer)
        for callback in callbacks:
            add(trainer, callback, told=not metrics_on)

    return train(folder, prepare=prepare, **{"max_steps": 5} | arguments)


class Restless(Qwen2ForCausalLM):
    """Statistics that a training forward changes, a counter that every forward changes, and
    random numbers that every forward draws."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]  # transformers has no types here
        self.norm = torch.nn.BatchNorm1d(config.hidden_size)
        self.register_buffer("calls", torch.zeros(()))

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        self.get_buffer("calls").add_(1)
        embedded = self.norm(self.get_input_embeddings()(input_ids).flatten(0, 1))
        noise = torch.rand(()) + np.random.rand() + random.random()
        output = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        # Of no value, but of every random number: the loss would show a disturbed one.
        output.loss = output.loss + 1e-3 * noise * embedded.mean()
        return output


def restless_model() -> Restless:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_dropout": 0.1,
    }
    return Restless(Qwen2Config(**sizes))


class Keeper(TrainerCallback):
    """Keeps the model's weights, as they are at some steps, for the oracle."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(state.global_step, kwargs["model"])

    def _keep(self, step: int, model: torch.nn.Module) -> None:
        self.states[step] = {name: value.clone() for name, value in model.state_dict().items()}


def expected_values(model: Any, name: str, records: list[Record]) -> dict[str, float]:
    """What a probe logs of `records`, all of them chosen, by counting token after token."""
    sequences = [tokens for _, tokens in token_table(model, records).values()]
    expected: dict[str, float] = {}
    for metric, index, limits in (("loss", 0, (0, math.inf)), ("token_acc", 1, (0, 1))):
        used = [[token[index] for token in tokens] for tokens in sequences if tokens]
        total = sum(len(values) for values in used)
        mean = sum(sum(values) for values in used) / total
        expected[f"dataset_{name}_{metric}"] = mean
        if len(used) < 2:
            continue
        squares = sum((sum(values) - mean * len(values)) ** 2 for values in used)
        half = math.sqrt(len(used) / (len(used) - 1) * squares) / total * student_t(len(used) - 1)
        if metric == "token_acc" and mean in (0, 1):
            half = 1 - 0.025 ** (1 / len(used))
        expected[f"dataset_{name}_{metric}_low"] = max(mean - half, limits[0])
        expected[f"dataset_{name}_{metric}_high"] = min(mean + half, limits[1])
    return expected


def probe_logs(logs: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    """{step: what the probe logged there, without what depends on time}"""
    return {
        int(entry["step"]): {key: value for key, value in entry.items() if _is_of_a_dataset(key)}
        for entry in logs
        if "probe_every" in entry
    }


def other_logs(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    """What the run logs besides, without what depends on time."""
    return [
        {
            key: value
            for key, value in entry.items()
            if not key.endswith(("_runtime", "_per_second"))
        }
        for entry in logs
        if "probe_every" not in entry
    ]


def random_numbers() -> list[float]:
    """The next random number of each generator."""
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


def draw_and_keep(record: Record) -> Record:
    """An `encode` that draws from every generator, as collators with masks do."""
    random_numbers()
    return record


def _is_of_a_dataset(key: str) -> bool:
    return key.startswith("dataset_")
