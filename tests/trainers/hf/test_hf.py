"""The HF Trainer with metrics on: the training is unchanged, and every number is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from hf_tools import (
    PaddingCollator,
    channel_logs,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
    train,
)
from packaging.version import Version
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import DataCollatorWithFlattening, Trainer

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import ChannelMetricsMixin, attach, detach

OLD = Version(transformers.__version__) < Version("5")
TRAINER_KEYS = ("loss", "grad_norm", "learning_rate", "eval_loss", "train_loss", "step")


class MixedTrainer(ChannelMetricsMixin, Trainer):
    """What a user who owns the script writes."""


def flattening() -> DataCollatorWithFlattening:
    return DataCollatorWithFlattening()


def trained_state(trainer: Any) -> list[torch.Tensor]:
    """The weights, and the state of the random numbers at this moment."""
    return [p.detach() for p in trainer.model.parameters()] + [torch.get_rng_state()]


@pytest.mark.parametrize("collator", [PaddingCollator, flattening])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_training_is_bit_identical(tmp_path: Path, collator: Any, accumulation: int) -> None:
    def trained() -> tuple[Any, list[torch.Tensor]]:
        trainer = train(
            tmp_path,
            max_steps=20,
            gradient_accumulation_steps=accumulation,
            eval_strategy="steps",
            eval_steps=7,
            trainer_arguments={
                "data_collator": collator(),
                "eval_dataset": Dataset.from_list(make_records(10, seed=1)),
            },
        )
        return trainer, trained_state(trainer)

    # Imported here: importing it applies it.
    import channel_metrics.patches.hf_trainer as patch

    patch.revert()
    runs = [trained()]
    patch.apply()
    try:
        runs.append(trained())
    finally:
        patch.revert()
    (plain, weights_off), (observed, weights_on) = runs
    for off, on in zip(weights_off, weights_on, strict=True):
        assert torch.equal(off, on)
    logs = [
        [{k: e[k] for k in TRAINER_KEYS if k in e} for e in run.state.log_history]
        for run in (plain, observed)
    ]
    assert logs[0] == logs[1]
    assert not channel_logs(plain) and channel_logs(observed)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_windows_equal_the_oracle(tmp_path: Path, left: bool, accumulation: int) -> None:
    """7 steps logged every 3: two full windows and the partial last one, in the final entry."""
    records, collator = make_records(96), PaddingCollator(left)
    model = tiny_model(attention_dropout=0.0)
    table = token_table(model, records)
    trainer = train(
        tmp_path,
        prepare=attach,
        model=model,
        records=records,
        learning_rate=0.0,
        max_steps=7,
        logging_steps=3,
        gradient_accumulation_steps=accumulation,
        trainer_arguments={"data_collator": collator},
    )
    logs = channel_logs(trainer)
    assert len(logs) == 3
    edges = [0, 3 * accumulation, 6 * accumulation, 7 * accumulation]
    # An epoch has 24 batches: no step is cut short by its end.
    for entry, start, end in zip(logs, edges[:-1], edges[1:], strict=True):
        assert entry == pytest.approx(
            expected_metrics(table, collator.batches[start:end]), rel=1e-5
        )
    assert "train_loss" in trainer.state.log_history[-1] and logs[-1].keys() <= (
        trainer.state.log_history[-1].keys()
    )


@pytest.mark.skipif(OLD, reason="before transformers 5, a CPU does not separate the sequences")
def test_flattened_windows_equal_the_oracle(tmp_path: Path) -> None:
    """One sequence of 64 tokens per batch, no padding: boundaries come from position ids."""
    records = make_records(16)
    model = tiny_model(attention_dropout=0.0, attn_implementation="eager")
    trainer = train(
        tmp_path,
        prepare=attach,
        model=model,
        records=records,
        learning_rate=0.0,
        max_steps=4,
        logging_steps=4,
        trainer_arguments={"data_collator": flattening()},
    )
    # All 16 records, once each: their order does not matter.
    expected = expected_metrics(token_table(model, records), [[r["input_ids"] for r in records]])
    (entry,) = channel_logs(trainer)
    # DataCollatorWithFlattening masks the first label of each sequence, which is never a target.
    assert entry == pytest.approx(expected, rel=1e-5)


def test_eval_window_is_apart_and_exact(tmp_path: Path) -> None:
    records, held_out = make_records(64), make_records(10, seed=1)
    model = tiny_model(attention_dropout=0.0)
    arguments: dict[str, Any] = {
        "learning_rate": 0.0,
        "max_steps": 6,
        "logging_steps": 4,
        "records": records,
    }
    plain = train(tmp_path, prepare=attach, model=model, **arguments)
    evaluated = train(
        tmp_path,
        prepare=attach,
        model=model,
        eval_strategy="steps",
        eval_steps=3,
        trainer_arguments={"eval_dataset": Dataset.from_list(held_out)},
        **arguments,
    )
    train_logs = [e for e in channel_logs(evaluated) if not any(k.startswith("eval_") for k in e)]
    assert train_logs == channel_logs(plain)
    table = token_table(model, held_out)
    expected = expected_metrics(table, [[r["input_ids"] for r in held_out]], prefix="eval_")
    eval_logs = [e for e in channel_logs(evaluated) if any(k.startswith("eval_") for k in e)]
    assert len(eval_logs) == 2
    for entry in eval_logs:
        assert entry == pytest.approx(expected, rel=1e-5)
    assert evaluated.evaluate().items() >= eval_logs[0].items()


def test_channels_add_up_to_the_trainers_loss(tmp_path: Path) -> None:
    trainer = train(tmp_path, prepare=attach, logging_steps=1, max_steps=5)
    for entry, channels in zip(trainer.state.log_history, channel_logs(trainer), strict=False):
        names = {key.removesuffix("_tokens") for key in channels if key.endswith("_tokens")}
        tokens = sum(channels[f"{name}_tokens"] for name in names)
        total = sum(channels[f"{name}_loss"] * channels[f"{name}_tokens"] for name in names)
        rounding = 5e-5 if OLD else 0.0
        assert total / tokens == pytest.approx(entry["loss"], rel=1e-6, abs=rounding)
    assert not trainer.channel_metrics.warned and not trainer.channel_scratch.reader.warned


def test_trackers_and_state_file_have_the_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = train(
        tmp_path,
        prepare=attach,
        report_to=["tensorboard"],
        save_strategy="steps",
        save_steps=4,
        **dict[str, Any](logging_dir=str(tmp_path / "board")) if OLD else {},
    )
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert state["log_history"] == logged
    assert all("bbu_loss" in entry for entry in logged)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    stored = [(event.step, event.value) for event in board.Scalars("train/bbu_loss")]
    last = trainer.state.log_history[-1]
    wanted = [(e["step"], e["bbu_loss"]) for e in [*logged, last] if "bbu_loss" in e]
    assert [step for step, _ in stored] == [step for step, _ in wanted]
    assert [v for _, v in stored] == pytest.approx([v for _, v in wanted], rel=1e-6)


def test_mixin_equals_attach(tmp_path: Path) -> None:
    config = MetricsConfig(metrics=("loss", "ppl", "samples"), key_format="{metric}/{channel}")
    runs = [
        train(tmp_path, prepare=lambda trainer: attach(trainer, config)),
        train(tmp_path, trainer_class=MixedTrainer, trainer_arguments={"channel_metrics": config}),
    ]
    logs = [[e for e in run.state.log_history if "loss" in e] for run in runs]
    assert logs[0] == logs[1]
    assert {"loss/bbu", "ppl/bbu", "samples/bbu"} <= logs[0][0].keys()


def test_detach_gives_the_trainer_back(tmp_path: Path) -> None:
    trainer = train(tmp_path, prepare=lambda trainer: detach(attach(trainer)))
    assert type(trainer) is Trainer and not channel_logs(trainer)


def test_attached_class_keeps_its_name(tmp_path: Path) -> None:
    trainer = train(tmp_path, prepare=lambda trainer: attach(attach(trainer)))
    assert type(trainer).__name__ == "Trainer" and isinstance(trainer, Trainer)
    assert type(trainer).__mro__.count(ChannelMetricsMixin) == 1


def test_second_training_starts_a_new_window(tmp_path: Path) -> None:
    def break_off(trainer: Any) -> None:
        attach(trainer)
        step = trainer.training_step
        calls = []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        trainer.training_step = failing
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.channel_metrics.peek(0).values
        trainer.training_step = step
        trainer.train_dataset = Dataset.from_list(make_records(16))

    records = make_records(16)
    trainer = train(tmp_path, prepare=break_off, max_steps=4, logging_steps=4)
    (entry,) = channel_logs(trainer)
    supervised = sum(label != -100 for r in records for label in r["labels"][1:])
    assert sum(v for k, v in entry.items() if k.endswith("_tokens")) == supervised
