"""DPOTrainer: rewards, margins and accuracies per channel, against each pair alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOTrainer
from trl_dpo_tools import (
    EVERYTHING,
    IGNORED,
    REWARD_ROUNDING,
    Batches,
    dpo,
    expected,
    pair_table,
    pairs_of,
)
from trl_tools import (
    CHANNELS,
    logs,
    pair_records,
    tiny_model,
    weights,
    windows,
)

from channel_metrics import UnsupportedVersionError
from channel_metrics.trainers.hf import attach, detach

pytestmark = IGNORED


def test_windows_are_means_over_the_pairs_of_a_channel(tmp_path: Path) -> None:
    """Over two micro-batches of two steps each; TRL's own values are those of all channels."""
    records, batches = pair_records(64), Batches()
    held_out = pair_records(11, seed=3)
    table = pair_table([*records, *held_out])
    trainer = dpo(
        tmp_path,
        records,
        prepare=lambda trainer: attach(trainer, EVERYTHING),
        before=batches,
        learning_rate=0.0,
        eval_dataset=Dataset.from_list(held_out),
        eval_strategy="steps",
        eval_steps=4,
    )
    found = logs(trainer)
    assert len(found) == 2
    totals: dict[str, float] = {}
    entries = [e for e in trainer.state.log_history if "loss" in e]
    for entry, whole, window in zip(found, entries, windows(batches.seen[True], 4), strict=True):
        pairs = pairs_of(window)
        want = expected(table, pairs)
        for name in CHANNELS:
            if f"{name}_samples" in want:
                totals[name] = totals.get(name, 0) + want[f"{name}_samples"]
                want[f"{name}_samples_total"] = totals[name]
        assert entry == pytest.approx(want, rel=1e-4, abs=REWARD_ROUNDING)
        for key in (
            "loss",
            *(f"rewards/{k}" for k in ("chosen", "rejected", "margins", "accuracies")),
        ):
            together = sum(
                entry[f"{name}_{key}"] * entry[f"{name}_samples"]
                for name in CHANNELS
                if f"{name}_samples" in entry
            )
            assert together / len(pairs) == pytest.approx(float(whole[key]), rel=1e-5, abs=1e-6)
    evaluated = logs(trainer, "eval_")
    assert len(evaluated) == 1
    assert evaluated[0] == pytest.approx(
        expected(table, pairs_of(batches.seen[False]), "eval_"), rel=1e-4, abs=REWARD_ROUNDING
    )
    assert sum(v for k, v in evaluated[0].items() if k.endswith("_samples")) == len(held_out)


def test_labels_of_an_axis_are_those_of_a_run_with_them_as_channels(tmp_path: Path) -> None:
    """In training, and in an evaluation. Each third record has no label."""
    domains = ("target", "aux", None)
    records = [
        record | {"meta": {"domain": domains[number % 3]}}
        for number, record in enumerate(pair_records(64))
    ]
    found = []
    for fields in ({"axes": {"domain": "meta.domain"}}, {"fields": ("meta.domain",)}):
        config = replace(EVERYTHING, **fields)
        trainer = dpo(
            tmp_path,
            records,
            prepare=lambda trainer, config=config: attach(trainer, config),
            eval_dataset=Dataset.from_list(records[:11]),
            eval_strategy="steps",
            eval_steps=4,
        )
        found.append(trainer.state.log_history)
    names, start = ("target", "aux", "unlabeled"), "domain/"
    labels, channels = (
        {
            (entry["step"], key): value
            for entry in history
            for key, value in entry.items()
            if key.removeprefix("eval_").startswith(tuple(f"{before}{name}_" for name in names))
        }
        for history, before in zip(found, (start, ""), strict=True)
    )
    assert {(step, key.replace(start, "")): value for (step, key), value in labels.items()} == (
        channels
    )
    for key in ("target_loss", "eval_aux_rewards/margins", "eval_unlabeled_samples"):
        assert (4, key) in channels
    assert any("bbu_loss" in entry for entry in found[0]), "the channels are there, too"


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    runs = [
        dpo(tmp_path, prepare=prepare, model=tiny_model(attention_dropout=0.1))
        for prepare in (None, attach)
    ]
    assert not logs(runs[0]) and logs(runs[1])
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    for plain, ours in zip(*(r.state.log_history for r in runs), strict=True):
        kept = {k: v for k, v in plain.items() if "runtime" not in k and "per_second" not in k}
        assert kept == {k: ours[k] for k in kept}
    # Nothing of ours is left where it was hooked in.
    assert "gather" not in vars(runs[1].accelerator)
    assert type(runs[1].loss_types) is list
    assert type(detach(runs[1])) is DPOTrainer


def test_other_gathers_are_refused(tmp_path: Path) -> None:
    def shuffle(trainer: Any) -> None:
        gather = trainer._compute_loss

        def first(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            trainer.accelerator.gather(torch.ones(len(inputs["input_ids"]) // 2))
            return gather(model, inputs, *args, **kwargs)

        trainer._compute_loss = first

    with pytest.raises(UnsupportedVersionError, match="in this order"):
        dpo(tmp_path, prepare=attach, before=shuffle)


def test_an_error_in_the_loss_leaves_nothing_behind(tmp_path: Path) -> None:
    met = []

    def nonsense(trainer: Any) -> None:
        trainer.loss_types = ["nonsense"]
        met.append(trainer.accelerator)

    with pytest.raises(ValueError, match="Unknown loss type"):
        dpo(tmp_path, prepare=attach, before=nonsense)
    assert "gather" not in vars(met[0])
