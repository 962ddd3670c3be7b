"""What happens beside the training step: nothing of it gets into a window, or closes one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_beside_tools import HELD_OUT, Doing, check_evaluation, check_windows, run
from hf_tools import (
    PaddingCollator,
    tiny_model,
)
from transformers import Qwen2ForCausalLM, Trainer


class DiesInEvaluation(Qwen2ForCausalLM):
    """The second batch of its first evaluation kills it."""

    evaluated = 0

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        if not self.training:
            self.evaluated += 1
            if self.evaluated == 2:
                raise RuntimeError("half-way")
        return super().forward(input_ids, attention_mask, labels=labels, **kwargs)


class MetricsThatDie:
    """At the end of the first evaluation."""

    evaluated = 0

    def __call__(self, _predictions: Any) -> dict[str, float]:
        self.evaluated += 1
        if self.evaluated == 1:
            raise RuntimeError("half-way")
        return {}


@pytest.mark.parametrize("where", ["model", "metrics"])
def test_an_evaluation_that_dies_leaves_both_windows_exact(tmp_path: Path, where: str) -> None:
    def caught(trainer: Trainer) -> None:
        with pytest.raises(RuntimeError, match="half-way"):
            trainer.evaluate()

    later: list[dict[str, float]] = []
    kind = DiesInEvaluation if where == "model" else Qwen2ForCausalLM
    model = tiny_model(kind=kind, attention_dropout=0.0)
    trainer, collator = run(
        tmp_path,
        Doing("on_step_end", 1, caught),
        Doing("on_step_end", 3, lambda trainer: later.append(trainer.evaluate())),
        model=model,
        trainer_arguments={} if where == "model" else {"compute_metrics": MetricsThatDie()},
    )
    check_windows(trainer, collator)
    for found in (*later, trainer.evaluate()):
        check_evaluation(found)


@pytest.mark.parametrize(
    "event",
    [
        "on_step_end",
        "on_log",
        "on_evaluate",
        "on_save",
    ],
)
def test_a_loss_that_a_callback_logs_closes_no_window(tmp_path: Path, event: str) -> None:
    """In mid-window, inside and outside of the place where the trainer logs."""
    trainer, collator = run(
        tmp_path,
        Doing(event, 2 if event == "on_log" else 3, lambda trainer: trainer.log({"loss": 9.0})),
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    assert [e["loss"] for e in trainer.state.log_history if "loss" in e].count(9.0) == 1
    check_windows(trainer, collator)


def test_losses_outside_of_a_step_are_not_counted(tmp_path: Path) -> None:
    """Of the user's own batches, and of the trainer's, in evaluation mode."""
    found: list[torch.Tensor] = []

    def measure(trainer: Any) -> None:
        model: Any = trainer.model.eval()
        with torch.no_grad():
            found.append(trainer.compute_loss(model, PaddingCollator()(HELD_OUT)))
            for batch in trainer.get_eval_dataloader():
                loss, _, _ = trainer.prediction_step(model, batch, prediction_loss_only=True)
                found.append(loss)

    trainer, collator = run(tmp_path, Doing("on_step_end", 3, measure))
    assert len(found) == 4
    check_windows(trainer, collator)


class SecondThread(Trainer):
    """Another model sees the labels of each micro-batch, in another thread, at the same time."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        other, losses = tiny_model(seed=1), []
        batch = {name: inputs[name].clone() for name in ("input_ids", "attention_mask", "labels")}
        thread = threading.Thread(target=lambda: losses.append(other(**batch).loss))
        thread.start()
        thread.join()
        assert len(losses) == 1
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_loss_in_another_thread_is_not_counted(tmp_path: Path) -> None:
    check_windows(*run(tmp_path, trainer_class=SecondThread))
