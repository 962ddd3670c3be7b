"""Evaluation: keys in time for those who decide by them, and apart from the train window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_tools import (
    PaddingCollator,
    Record,
    channel_logs,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
    train,
)
from transformers import EarlyStoppingCallback

from channel_metrics import ConfigError, MetricsConfig
from channel_metrics.trainers.hf import attach

SETS = {"near": make_records(7, seed=1), "far": make_records(10, seed=2)}


def datasets() -> dict[str, Dataset]:
    return {name: Dataset.from_list(records) for name, records in SETS.items()}


def expected(records: list[Record], prefix: str) -> dict[str, float]:
    table = token_table(tiny_model(attention_dropout=0.0), records)
    return expected_metrics(table, [[r["input_ids"] for r in records]], prefix=prefix)


def only_channels(entry: dict[str, float], prefix: str) -> dict[str, float]:
    names = tuple(f"{prefix}{name}_" for name in ("bbu", "rru", "lvis", "lang_chat", "unlabeled"))
    return {key: value for key, value in entry.items() if key.startswith(names)}


def evaluated(folder: Path, **arguments: Any) -> Any:
    given: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, **arguments}
    return train(folder, prepare=given.pop("prepare", attach), **given)


def test_a_dict_of_sets(tmp_path: Path) -> None:
    plain = train(
        tmp_path,
        prepare=attach,
        model=tiny_model(attention_dropout=0.0),
        learning_rate=0.0,
        logging_steps=4,
    )
    trainer = evaluated(
        tmp_path,
        model=tiny_model(attention_dropout=0.0),
        learning_rate=0.0,
        logging_steps=4,
        trainer_arguments={"eval_dataset": datasets()},
    )
    for name, records in SETS.items():
        prefix = f"eval_{name}_"
        entries = [entry for entry in trainer.state.log_history if f"{prefix}loss" in entry]
        assert len(entries) == 2
        for entry in entries:
            wanted = expected(records, prefix)
            assert only_channels(entry, prefix) == pytest.approx(wanted, rel=1e-5)
    # Four evaluations fell into the train window, which is that of a run without any.
    kept = [e for e in trainer.state.log_history if "loss" in e]
    assert [only_channels(e, "") for e in kept] == channel_logs(plain)


def test_a_set_by_its_name_and_a_prediction(tmp_path: Path) -> None:
    trainer = train(
        tmp_path,
        prepare=attach,
        model=tiny_model(attention_dropout=0.0),
        learning_rate=0.0,
        max_steps=1,
        trainer_arguments={"eval_dataset": datasets()},
    )
    by_name = trainer.evaluate("far", metric_key_prefix="chosen")
    wanted = expected(SETS["far"], "chosen_")
    assert only_channels(by_name, "chosen_") == pytest.approx(wanted, rel=1e-5)
    predicted = trainer.predict(datasets()["near"]).metrics
    wanted = expected(SETS["near"], "test_")
    assert only_channels(predicted, "test_") == pytest.approx(wanted, rel=1e-5)


def set_losses(values: list[float], key: str = "eval_bbu_loss") -> Any:
    """Make this value of the evaluation these values, in turn, from our own window."""
    remaining = iter(values)

    def prepare(trainer: Any) -> None:
        attach(trainer, MetricsConfig(metrics=("loss", "macro_loss")))
        session = trainer.channel_metrics
        write = session.write

        def written(window: Any, logs: dict[str, Any]) -> None:
            write(window, logs)
            if window.split != "train":
                assert key in logs
                logs[key] = next(remaining)

        session.write = written

    return prepare


def test_the_best_model_is_chosen_by_a_channel(tmp_path: Path) -> None:
    trainer = evaluated(
        tmp_path,
        prepare=set_losses([3.0, 1.0, 2.0]),
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_bbu_loss",
        greater_is_better=False,
        trainer_arguments={"eval_dataset": Dataset.from_list(SETS["far"])},
    )
    assert trainer.state.best_metric == 1.0
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    state = trainer.state.log_history
    assert [e["eval_bbu_loss"] for e in state if "eval_bbu_loss" in e] == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "key",
    ["eval_bbu_loss", "eval_macro_loss", "eval_worst_loss", "eval_weighted_loss_of_channels"],
)
def test_the_best_model_is_chosen_by_the_measured_loss(tmp_path: Path, key: str) -> None:
    """Also with `top`, which would hide `bbu` from the first two evaluations."""
    config = MetricsConfig(
        metrics=("loss", "macro_loss", "worst_loss", "weighted_loss_of_channels"),
        channel_weights={"bbu": 1, "lang_chat": 3},
        top=1,
    )
    trainer = evaluated(
        tmp_path,
        prepare=lambda trainer: attach(trainer, config),
        max_steps=6,
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model=key,
        greater_is_better=False,
        trainer_arguments={"eval_dataset": Dataset.from_list(SETS["far"])},
    )
    losses = {e["step"]: e[key] for e in trainer.state.log_history if key in e}
    assert len(losses) == 3
    best = min(losses, key=losses.__getitem__)
    assert trainer.state.best_metric == losses[best]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    # What was loaded at the end is what was measured then.
    assert trainer.evaluate()[key] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize("key", ["eval_bbu_loss", "eval_macro_loss"])
def test_early_stopping_of_transformers(tmp_path: Path, key: str) -> None:
    trainer = evaluated(
        tmp_path,
        prepare=set_losses([3.0, 1.0, 2.0, 2.0, 0.5], key),
        max_steps=20,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model=key,
        greater_is_better=False,
        trainer_arguments={
            "eval_dataset": Dataset.from_list(SETS["far"]),
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)],
        },
    )
    assert trainer.state.global_step == 8
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


def test_stop_when_is_checked_before_training(tmp_path: Path) -> None:
    for settings, said in (
        ({"channel": "bbu", "metric": "eval_ppl"}, "stop_when is 'eval_bbu_ppl', but"),
        ({"channel": "lang_chat", "metric": "eval_loss"}, "which no record of this set has"),
        ({"channel": "bbuu", "metric": "loss"}, "of this set has; did you mean 'bbu'"),
        ({"metric": "eval_macro_loss"}, "'macro_loss' is not among `metrics`"),
    ):
        config = MetricsConfig(stop_when=settings)
        held_out = [r for r in SETS["far"] if r["channel"] != "lang_chat"]
        with pytest.raises(ConfigError, match=said):
            evaluated(
                tmp_path,
                prepare=lambda trainer, config=config: attach(trainer, config),
                trainer_arguments={"eval_dataset": Dataset.from_list(held_out)},
            )


def test_channels_that_only_the_users_collator_knows(tmp_path: Path) -> None:
    """The records have none, so the config declares them; keys that wait for them are let be."""
    padded = PaddingCollator()

    def collate(features: list[Any]) -> dict[str, Any]:
        return {**padded(features), "channels": [("bbu", "rru")[f["origin"]] for f in features]}

    records = [{**r, "origin": n % 2} for n, r in enumerate(make_records(16))]
    unnamed = Dataset.from_list(records).remove_columns("channel")
    waiting = {"channel": "rru", "metric": "eval_loss", "patience": 9}
    config = MetricsConfig(channels=("bbu", "rru"), stop_when=waiting)
    trainer = train(
        tmp_path,
        records=unnamed,
        prepare=lambda trainer: attach(trainer, config),
        trainer_arguments={"data_collator": collate, "eval_dataset": unnamed},
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_bbu_loss",
        remove_unused_columns=False,
    )
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"bbu_loss", "rru_loss", "eval_bbu_loss", "eval_rru_loss"} < logged


def test_eval_channels_filter(tmp_path: Path) -> None:
    config = MetricsConfig(eval_channels=("bbu", "lvis"))
    trainer = evaluated(
        tmp_path,
        prepare=lambda trainer: attach(trainer, config),
        trainer_arguments={"eval_dataset": Dataset.from_list(SETS["far"])},
    )
    names = {record["channel"] for record in SETS["far"]}
    assert {"bbu", "lvis"} < names
    for entry in trainer.state.log_history:
        kept = only_channels(entry, "eval_")
        if "eval_loss" in entry:
            assert {key.split("_")[1] for key in kept} == {"bbu", "lvis"}
            # The share is that of all tokens, not only of those that are shown.
            assert sum(v for k, v in kept.items() if k.endswith("_share")) < 1
        else:
            assert not kept
    trained = {key for e in channel_logs(trainer) for key in only_channels(e, "")}
    assert "rru_loss" in trained
