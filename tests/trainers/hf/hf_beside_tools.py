"""A run in which something happens beside the training step, and the windows that it must have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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
from transformers import Trainer, TrainerCallback

from channel_metrics.trainers.hf import attach

RECORDS = make_records(64)
HELD_OUT = make_records(10, seed=1)
# What the training loop itself logs.
WINDOWS = [2, 4]


class Doing(TrainerCallback):
    """Calls `act(trainer)` in one event of one step."""

    def __init__(self, event: str, step: int, act: Callable[[Trainer], object]) -> None:
        self.event, self.step, self.act = event, step, act
        self.trainer: Any = None
        self.done = 0
        setattr(self, event, self._called)

    def _called(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Once: an act may cause its own event.
        if state.global_step == self.step and not self.done:
            self.done += 1
            self.act(self.trainer)


def run(folder: Path, *callbacks: Doing, **arguments: Any) -> tuple[Any, PaddingCollator]:
    """Four steps with a learning rate of 0, logged every two."""
    collator = PaddingCollator()

    def prepare(trainer: Trainer) -> None:
        attach(trainer)
        for callback in callbacks:
            callback.trainer = trainer
            trainer.add_callback(callback)

    more = arguments.pop("trainer_arguments", {})
    trainer = train(
        folder,
        prepare=prepare,
        model=arguments.pop("model", None) or tiny_model(attention_dropout=0.0),
        records=RECORDS,
        learning_rate=0.0,
        trainer_arguments={"data_collator": collator, "eval_dataset": held_out()} | more,
        **arguments,
    )
    assert all(callback.done == 1 for callback in callbacks)
    return trainer, collator


def held_out() -> Dataset:
    return Dataset.from_list(HELD_OUT)


def check_windows(trainer: Trainer, collator: PaddingCollator) -> None:
    """Both windows hold the records of their steps and nothing else; no other log has channels."""
    table = token_table(tiny_model(attention_dropout=0.0), RECORDS)
    batches = [batch for batch in collator.batches if tuple(batch[0]) in table]
    entries = {e["step"]: e for e in trainer.state.log_history if "grad_norm" in e}
    assert list(entries) == WINDOWS
    logged = [e for e in channel_logs(trainer) if not any(key.startswith("eval_") for key in e)]
    assert len(logged) == len(WINDOWS)
    for found, start in zip(logged, (0, 2), strict=True):
        assert found == pytest.approx(expected_metrics(table, batches[start : start + 2]), rel=1e-5)
        assert found.items() <= entries[start + 2].items()


def check_evaluation(found: dict[str, float]) -> None:
    table = token_table(tiny_model(attention_dropout=0.0), HELD_OUT)
    want = expected_metrics(table, [[r["input_ids"] for r in HELD_OUT]], prefix="eval_")
    own = ("eval_loss", "eval_model_preparation_time")
    speed = ("_runtime", "_per_second")
    ours = {k: v for k, v in found.items() if not k.endswith(speed) and k not in (*own, "epoch")}
    assert ours == pytest.approx(want, rel=1e-5)
