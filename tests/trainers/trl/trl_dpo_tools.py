"""Runs of DPOTrainer, and what each pair alone gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from contract.pairs import log_prob
from packaging.version import Version
from trl import DPOConfig, DPOTrainer
from trl_tools import (
    ALPHABETS,
    CHANNELS,
    arguments,
    pair_records,
    run,
    tiny_model,
)

from channel_metrics import MetricsConfig

BETA = 0.3
EVERYTHING = MetricsConfig(metrics=("loss", "samples", "share", "samples_total"))
# A reward is BETA times a difference of float32 sums of tens, where neighbours are 4e-6 apart.
REWARD_ROUNDING = 3e-6


class Batches:
    """The token rows of each batch, chosen before rejected, as the trainer's loss gets them."""

    def __init__(self) -> None:
        self.seen: dict[bool, list[list[tuple[int, ...]]]] = {True: [], False: []}

    def __call__(self, trainer: Any) -> None:
        inner = trainer._compute_loss

        def keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            masks = inputs["attention_mask"].bool()
            rows = [tuple(r[m].tolist()) for r, m in zip(inputs["input_ids"], masks, strict=True)]
            self.seen[model.training].append(rows)
            return inner(model, inputs, *args, **kwargs)

        trainer._compute_loss = keep


def dpo(folder: Path, records: Any = None, trainer_class: Any = DPOTrainer, **options: Any) -> Any:
    names = ("prepare", "before", "eval_dataset", "model")
    keywords = {name: options.pop(name) for name in names if name in options}
    keywords.setdefault("model", tiny_model())
    config = DPOConfig(**arguments(folder, **{"beta": BETA, "max_length": 64, **options}))
    records = pair_records(64) if records is None else records
    # Another reference than the model, or all rewards would be 0 at the start.
    keywords["ref_model"] = tiny_model(seed=7)
    return run(trainer_class, config, records, **keywords)


def pair_table(records: list[dict[str, Any]]) -> dict[Any, tuple[str, float, float]]:
    """{the tokens of both answers: (channel, reward of chosen, of rejected)}, each pair alone."""
    model, reference = (m.double().eval() for m in (tiny_model(), tiny_model(seed=7)))
    table = {}
    for record in records:
        prompt = list(record["prompt"].encode())
        rewards, rows = [], []
        for side in ("chosen", "rejected"):
            answer = [*record[side].encode(), 257]
            rewards.append(
                BETA * (log_prob(model, prompt, answer) - log_prob(reference, prompt, answer))
            )
            rows.append((*prompt, *answer))
        table[tuple(rows)] = (record["channel"], *rewards)
    return table


def pairs_of(batches: Any) -> list[Any]:
    found = []
    for rows in batches:
        half = len(rows) // 2
        found += list(zip(rows[:half], rows[half:], strict=True))
    return found


def expected(table: Any, pairs: Any, prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name in CHANNELS:
        mine = [table[pair][1:] for pair in pairs if table[pair][0] == name]
        if not mine:
            continue
        n = len(mine)
        values = {
            "rewards/chosen": sum(c for c, _ in mine) / n,
            "rewards/rejected": sum(r for _, r in mine) / n,
            "rewards/margins": sum(c - r for c, r in mine) / n,
            "rewards/accuracies": sum(c > r for c, r in mine) / n,
            "loss": sum(math.log1p(math.exp(r - c)) for c, r in mine) / n,
            "samples": n,
            "share": n / len(pairs),
        }
        found |= {f"{prefix}{name}_{key}": value for key, value in values.items()}
    return found


class Inputs:
    """The batches of the training, as the trainer's loss gets them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, trainer: Any) -> None:
        inner = trainer._compute_loss

        def keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(dict(inputs))
            return inner(model, inputs, *args, **kwargs)

        trainer._compute_loss = keep

    def each_alone(self) -> list[tuple[str, dict[str, torch.Tensor]]]:
        """The channel of each pair, and a batch with that pair only."""
        alone = []
        for inputs in self.seen:
            rows = len(inputs["input_ids"])
            for i in range(rows // 2):
                pair = {
                    k: v[[i, i + rows // 2]] if len(v) == rows else v[[i]]
                    for k, v in inputs.items()
                }
                first = chr(inputs["input_ids"][i][inputs["attention_mask"][i].bool()][0])
                (name,) = (n for n, letters in ALPHABETS.items() if first in letters)
                alone.append((name, pair))
        return alone


# What trl and transformers warn of in every run of these tests.
IGNORED = [
    # trl 1.16 reads a property that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated"),
]
# trl 0.29 leaves constants out of its f-divergences, and has no sigmoid_norm.
OLD = Version(trl.__version__) < Version("1.0")
