"""RewardTrainer: loss, accuracy, margin and rewards per channel, against each answer alone."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import Qwen2Config, Qwen2ForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl_tools import CHANNELS, arguments, logs, pair_records, run, sizes, weights, windows

from channel_metrics import ChannelError, MetricsConfig
from channel_metrics.trainers.hf import attach

CENTER = 0.05
pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < Version("0.24"), reason="refused, see test_trl_old"
)
# Older transformers rounds the loss that it logs.
ROUNDING = 5e-5 if Version(transformers.__version__) < Version("5") else 1e-6
EVERYTHING = MetricsConfig(metrics=("loss", "tokens", "share"))


def reward_model(**overrides: Any) -> Qwen2ForSequenceClassification:
    torch.manual_seed(0)
    return Qwen2ForSequenceClassification(Qwen2Config(**sizes(num_labels=1, **overrides)))


def reward_records(count: int, seed: int = 0, margin: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "chosen": record["prompt"] + record["chosen"],
            "rejected": record["prompt"] + record["rejected"],
            "channel": record["channel"],
        }
        | ({"margin": 0.25 * (index % 3)} if margin else {})
        for index, record in enumerate(pair_records(count, seed))
    ]


def train(folder: Path, records: Any = None, **options: Any) -> Any:
    names = ("prepare", "before", "eval_dataset", "model")
    keywords = {name: options.pop(name) for name in names if name in options}
    keywords.setdefault("model", reward_model())
    config = RewardConfig(**arguments(folder, **{"center_rewards_coefficient": CENTER, **options}))
    records = reward_records(64) if records is None else records
    return run(RewardTrainer, config, records, **keywords)


class Batches:
    """The token rows of each batch, chosen before rejected, as the model gets them."""

    def __init__(self) -> None:
        self.seen: dict[bool, list[list[tuple[int, ...]]]] = {True: [], False: []}

    def __call__(self, trainer: Any) -> None:
        trainer.model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks = kwargs["attention_mask"].bool()
        rows = [tuple(r[m].tolist()) for r, m in zip(kwargs["input_ids"], masks, strict=True)]
        self.seen[model.training].append(rows)


def pair_table(records: list[dict[str, Any]]) -> dict[Any, tuple[str, float, float, float]]:
    """{the tokens of both answers: (channel, reward of chosen, of rejected, margin)}."""
    model = reward_model().double().eval()
    table = {}
    for record in records:
        rows = [(*record[side].encode(), 257) for side in ("chosen", "rejected")]
        with torch.no_grad():
            rewards = [model(torch.tensor([row])).logits.item() for row in rows]
        table[tuple(rows)] = (record["channel"], *rewards, record["margin"])
    return table


def expected(table: Any, batches: Any, prefix: str = "") -> dict[str, float]:
    pairs = [
        pair
        for rows in batches
        for pair in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)
    ]
    found: dict[str, float] = {}
    for name in CHANNELS:
        mine = [table[pair][1:] for pair in pairs if table[pair][0] == name]
        if not mine:
            continue
        n = len(mine)
        loss = sum(math.log1p(math.exp(r + m - c)) + CENTER * (c + r) ** 2 for c, r, m in mine)
        values = {
            "loss": loss / n,
            "accuracy": sum(c > r for c, r, _ in mine) / n,
            "margin": sum(c - r for c, r, _ in mine) / n,
            "mean_reward": sum(c + r for c, r, _ in mine) / (2 * n),
            "rewards/chosen": sum(c for c, _, _ in mine) / n,
            "rewards/rejected": sum(r for _, r, _ in mine) / n,
            "samples": n,
            "share": n / len(pairs),
        }
        found |= {f"{prefix}{name}_{key}": value for key, value in values.items()}
    return found


def test_windows_are_means_over_the_pairs_of_a_channel(tmp_path: Path) -> None:
    records, held_out, batches = reward_records(64), reward_records(11, seed=3), Batches()
    table = pair_table([*records, *held_out])
    trainer = train(
        tmp_path,
        records,
        prepare=lambda trainer: attach(trainer, EVERYTHING),
        before=batches,
        learning_rate=0.0,
        eval_dataset=Dataset.from_list(held_out),
        eval_strategy="steps",
        eval_steps=4,
    )
    found, entries = logs(trainer), [e for e in trainer.state.log_history if "loss" in e]
    assert len(found) == 2
    for entry, whole, window in zip(found, entries, windows(batches.seen[True], 4), strict=True):
        assert entry == pytest.approx(expected(table, window), rel=1e-4, abs=1e-6)
        for key in ("loss", "accuracy", "margin", "mean_reward"):
            together = sum(
                entry[f"{name}_{key}"] * entry[f"{name}_share"]
                for name in CHANNELS
                if f"{name}_share" in entry
            )
            assert together == pytest.approx(float(whole[key]), rel=1e-5, abs=ROUNDING)
    (evaluated,) = logs(trainer, "eval_")
    assert evaluated == pytest.approx(
        expected(table, batches.seen[False], "eval_"), rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize("margin", [True, False])
def test_training_is_the_same_with_and_without(
    tmp_path: Path, margin: bool, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [
        train(
            tmp_path,
            reward_records(64, margin=margin),
            prepare=prepare,
            model=reward_model(attention_dropout=0.1),
            center_rewards_coefficient=CENTER if margin else None,
        )
        for prepare in (None, attach)
    ]
    assert not logs(runs[0]) and logs(runs[1])
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    # The loss per pair is ours, by TRL's formula: compared to TRL's own in each batch.
    assert "do not add up to the trainer's own" not in caplog.text


class Doubled(RewardTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        above: Any = super()
        return 2 * above.compute_loss(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_formula_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    config = RewardConfig(**arguments(tmp_path, max_steps=2))
    model: Any = reward_model()
    run(Doubled, config, reward_records(64), model=model.to(dtype), prepare=attach)
    assert re.search("own loss: the relative difference is (5.0|4.9)e-01", caplog.text)


@pytest.mark.parametrize("margin", [True, False])
def test_rounding_of_half_precision_is_not_reported(
    tmp_path: Path, margin: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The rewards are bfloat16, and so are the terms that TRL adds up."""
    trainer = train(
        tmp_path,
        reward_records(64, margin=margin),
        model=reward_model().bfloat16(),
        prepare=lambda t: attach(t, EVERYTHING),
    )
    assert min(entry["bbu_loss"] for entry in logs(trainer)) > 0
    assert not caplog.messages


def test_pairs_without_a_channel(tmp_path: Path) -> None:
    records = reward_records(64)
    with pytest.raises(ChannelError, match="none of the 64 records of the train set"):
        train(tmp_path, [{**r, "channel": None} for r in records], prepare=attach)
    for index in range(0, 64, 2):
        records[index]["channel"] = None
    trainer = train(tmp_path, records, prepare=lambda t: attach(t, EVERYTHING), max_steps=4)
    assert min(entry["unlabeled_samples"] for entry in logs(trainer)) > 0
