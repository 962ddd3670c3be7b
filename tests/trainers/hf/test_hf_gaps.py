"""What happens beside the training step: nothing of it gets into a window, or closes one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hf_tools import (
    VOCABULARY,
    PaddingCollator,
    Record,
    channel_logs,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
    train,
)
from transformers import BertConfig, BertForMaskedLM, Qwen2ForCausalLM, Trainer, TrainerCallback

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


def run(folder: Path, *callbacks: Doing, **arguments: Any) -> tuple[Trainer, PaddingCollator]:
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


# ---- evaluations and logs -------------------------------------------------------------------


class DiesInEvaluation(Qwen2ForCausalLM):
    """The second batch of its first evaluation kills it."""

    evaluated = 0

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):  # type: ignore[override]
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
    plain = tiny_model(attention_dropout=0.0)
    model = DiesInEvaluation(plain.config) if where == "model" else plain
    model.load_state_dict(plain.state_dict())
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


# What a callback logs while the trainer evaluates or saves is taken for the trainer's own log.
CLOSES = pytest.mark.xfail(strict=True, reason="closes the train window in the middle of it")


@pytest.mark.parametrize(
    "event",
    [
        "on_step_end",
        "on_log",
        pytest.param("on_evaluate", marks=CLOSES),
        pytest.param("on_save", marks=CLOSES),
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


# ---- losses that are no training ------------------------------------------------------------


def test_losses_outside_of_a_step_are_not_counted(tmp_path: Path) -> None:
    """Of the user's own batches, and of the trainer's, in evaluation mode."""
    found: list[torch.Tensor] = []

    def measure(trainer: Trainer) -> None:
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


# ---- losses of their own kind ---------------------------------------------------------------


class Liar(Qwen2ForCausalLM):
    """From its second step on, the sum that its loss is made of is not that of its tokens."""

    steps = 0
    grows = False

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):  # type: ignore[override]
        self.steps += 1
        factor, honest = float(self.steps) if self.grows else 2.0, F.nll_loss

        def lying(*args: Any, reduction: str = "mean", **kwargs: Any) -> torch.Tensor:
            loss = honest(*args, reduction=reduction, **kwargs)
            return loss if reduction == "none" else factor * loss

        # The first step is honest: there, the way to the token losses is tried.
        F.nll_loss = honest if self.steps == 1 else lying
        try:
            return super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        finally:
            F.nll_loss = honest


@pytest.mark.parametrize(
    "grows",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.xfail(
                strict=True, reason="said again for each amount: it is in the text"
            ),
        ),
    ],
)
def test_a_loss_that_lies_is_reported_once(
    tmp_path: Path, grows: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In both windows, by the same amount or by another."""
    plain = tiny_model(attention_dropout=0.0)
    model = Liar(plain.config)
    model.grows = grows
    model.load_state_dict(plain.state_dict())
    trainer, collator = run(tmp_path, model=model)
    check_windows(trainer, collator)
    said = [r.getMessage() for r in caplog.records if r.name == "channel_metrics"]
    assert len([text for text in said if "differs from the trainer's own" in text]) == 1, said


class PackedRows:
    """Two records of eight tokens per row; where one ends can be seen in the positions."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[Record], dict[str, torch.Tensor]]] = []

    def __call__(self, features: list[Record]) -> dict[str, torch.Tensor]:
        batch = {
            name: torch.tensor([feature[name] for feature in features]).view(-1, 16)
            for name in ("input_ids", "labels")
        }
        batch["position_ids"] = torch.arange(8).repeat(len(features) // 2, 2)
        self.batches.append((features, dict(batch)))
        return batch


def masked_records(count: int) -> list[Record]:
    """About half of the labels are asked for, the first and the last always."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for index in range(count):
        ids = torch.randint(1, VOCABULARY, (8,), generator=generator)
        hidden = torch.rand(8, generator=generator) < 0.5
        hidden[[0, -1]] = False
        labels = ids.masked_fill(hidden, -100)
        channel = ("bbu", "rru", "lvis")[index % 3]
        records.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "channel": channel})
    return records


def test_masked_language_models_with_packed_rows(tmp_path: Path) -> None:
    """Nothing is shifted: the loss at a position is about its own label, also at an edge."""
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    records, collator = masked_records(32), PackedRows()
    trainer = train(
        tmp_path,
        prepare=attach,
        model=model,
        records=records,
        learning_rate=0.0,
        trainer_arguments={"data_collator": collator},
    )
    channel_of = {tuple(record["input_ids"]): record["channel"] for record in records}
    exact = model.double().eval()
    for entry, start in zip(channel_logs(trainer), (0, 2), strict=True):
        nll: dict[str, list[float]] = {}
        for features, batch in collator.batches[start : start + 2]:
            with torch.no_grad():
                rows = exact(**batch).logits.log_softmax(-1).view(len(features), 8, -1)
            for feature, log_probs in zip(features, rows, strict=True):
                of_channel = nll.setdefault(channel_of[tuple(feature["input_ids"])], [])
                for position, label in enumerate(feature["labels"]):
                    if label != -100:
                        of_channel.append(-log_probs[position, label].item())
        for name, losses in nll.items():
            assert entry[f"{name}_tokens"] == len(losses)
            assert entry[f"{name}_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert sum(v for k, v in entry.items() if k.endswith("_tokens")) == sum(
            map(len, nll.values())
        )
