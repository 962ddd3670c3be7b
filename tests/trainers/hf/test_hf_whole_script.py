"""A patch that is switched on for a whole script: what is not for us trains as without us."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partialmethod
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_tools import PaddingCollator, channel_logs, make_records, tiny_model, train
from torch import Tensor
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification, Trainer
from transformers.modeling_outputs import CausalLMOutput

from channel_metrics import MetricsConfig, UnsupportedVersionError
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.hf import patch as hf_patch

CHANNEL = {"channel": "aa"}


@pytest.fixture
def patched() -> Callable[..., Trainer]:
    """`train`, with the patch."""

    def run(*args: Any, **kwargs: Any) -> Any:
        hf_patch.apply(MetricsConfig())
        try:
            return train(*args, **kwargs)
        finally:
            hf_patch.revert()

    return run


def traces(trainer: Any) -> Any:
    """The logs without times, and the weights."""
    logs = [
        {key: value for key, value in entry.items() if "runtime" not in key and "second" not in key}
        for entry in trainer.state.log_history
    ]
    return logs, [p.detach() for p in trainer.model.parameters()]


def pad(features: list[Any], label: Callable[[Any], Any]) -> dict[str, Tensor]:
    batch = PaddingCollator()(features)
    return batch | {"labels": torch.tensor([label(feature) for feature in features])}


def classes(features: list[Any]) -> dict[str, Tensor]:
    return pad(features, lambda feature: len(feature["input_ids"]) % 2)


def numbers(features: list[Any]) -> dict[str, Tensor]:
    return pad(features, lambda feature: len(feature["input_ids"]) / 17)


class Regressor(torch.nn.Module):
    """Takes anything, and would choke on nothing: keys of ours would change what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_x: Tensor, labels: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        found = input_x * self.weight + len(more)
        return ((found - labels) ** 2).mean(), found


class Points(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_x": float(index), "labels": 2.0 * index}


def classifier(num_labels: int) -> Qwen2ForSequenceClassification:
    torch.manual_seed(0)
    config = tiny_model().config
    config.num_labels, config.pad_token_id = num_labels, 0
    return Qwen2ForSequenceClassification(config)


class ReadsNothing(Qwen2ForCausalLM):
    """Its loss cannot be read."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        return CausalLMOutput(loss=output.logits.square().mean())


def without(records: list[Any]) -> list[Any]:
    return [{k: v for k, v in record.items() if k != "channel"} for record in records]


class Unscanned(torch.utils.data.Dataset[Any]):
    def __init__(self, records: list[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


def stream(records: list[Any]) -> Any:
    return Dataset.from_list(records).to_iterable_dataset()


def model_of(kind: str) -> torch.nn.Module:
    if kind == "tensors":
        return Regressor()
    if kind in ("classes", "one class a batch"):
        return classifier(2)
    if kind == "numbers":
        return classifier(1)
    return tiny_model(kind=ReadsNothing) if kind == "unreadable" else tiny_model()


# {kind: (arguments of the run, level of the one line, what it says)}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "classes": ({"trainer_arguments": {"data_collator": classes}}, "INFO", "left alone"),
    "one class a batch": (
        {"trainer_arguments": {"data_collator": classes}, "per_device_train_batch_size": 1},
        "INFO",
        "left alone",
    ),
    "numbers": ({"trainer_arguments": {"data_collator": numbers}}, "INFO", "left alone"),
    "tensors": (
        {"trainer_arguments": {"data_collator": None}, "records": Points()},
        "INFO",
        "left alone",
    ),
    "no column": ({"records": without(make_records(16))}, "WARNING", "set `fields` to the one"),
    "no column, unscanned": (
        {"records": Unscanned(without(make_records(16))), "logging_steps": 99},
        "WARNING",
        "found columns attention_mask, input_ids, labels; set `fields` to the one that names",
    ),
    "no column in a stream": (
        {"records": stream(without(make_records(16))), "logging_steps": 99},
        "WARNING",
        "no record of the first batch has a channel: looked for channel, dataset_source",
    ),
    "an empty column": (
        {"records": Unscanned([r | {"channel": None} for r in make_records(16)])},
        "WARNING",
        "had a channel (looked for",
    ),
    "unreadable": ({}, "WARNING", "cannot be seen per token"),
}


@pytest.mark.parametrize("kind", CASES)
def test_it_trains_as_without_us(
    kind: str, patched: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments, level, says = CASES[kind]
    plain = train(tmp_path, model=model_of(kind), **arguments)
    caplog.set_level(logging.INFO, "channel_metrics")
    caplog.clear()
    trainer = patched(tmp_path, model=model_of(kind), **arguments)
    torch.testing.assert_close(traces(trainer), traces(plain), rtol=0, atol=0)
    lines = [r for r in caplog.records if r.name == "channel_metrics" and says in r.getMessage()]
    assert [line.levelname for line in lines] == [level]
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == (level == "WARNING")


@pytest.mark.parametrize("every", [4, 1])
def test_a_stream_with_channels_in_some_records_is_measured(
    every: int, patched: Any, tmp_path: Path
) -> None:
    """The first batch has no channel, and if it is a window of its own, no tokens either."""
    records = make_records(16)
    for record in records[:4]:
        labels = record["labels"] if every > 1 else [-100] * len(record["labels"])
        record.update(channel=None, labels=labels)
    found: Counter[str] = Counter()
    for entry in channel_logs(patched(tmp_path, records=stream(records), logging_steps=every)):
        found.update({k: int(v) for k, v in entry.items() if k.endswith("_tokens")})
    names = [r["channel"] or "unlabeled" for r in records for x in r["labels"][1:] if x != -100]
    assert found == Counter(f"{name}_tokens" for name in names)


@pytest.mark.parametrize("kind", ["classes", "language model"])
def test_only_a_measured_trainer_misses_its_totals(
    kind: str, patched: Any, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = CASES[kind][0] if kind == "classes" else {}
    checkpoint = tmp_path / "checkpoint-2"
    train(tmp_path, model=model_of(kind), save_strategy="steps", save_steps=2, **arguments)
    monkeypatch.setattr(
        Trainer, "train", partialmethod(Trainer.train, resume_from_checkpoint=str(checkpoint))
    )
    patched(tmp_path, model=model_of(kind), **arguments)
    missed = [r for r in caplog.records if "count from here" in r.getMessage()]
    assert len(missed) == (kind != "classes")


def test_a_language_model_beside_them_is_measured(patched: Any, tmp_path: Path) -> None:
    trainer = patched(tmp_path)
    assert channel_logs(trainer) == channel_logs(train(tmp_path, prepare=attach)) != []


@pytest.mark.parametrize("collate", [classes, numbers])
@pytest.mark.parametrize("size", [1, 4])
def test_attach_refuses_a_classifier(collate: Any, size: int, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedVersionError, match="one for each token, but Trainer got"):
        train(
            tmp_path,
            prepare=attach,
            model=classifier(2 if collate is classes else 1),
            per_device_train_batch_size=size,
            trainer_arguments={"data_collator": collate},
        )


class CallsTheModel(Trainer):
    def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
        model.train()
        loss: Tensor = model(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


class EvaluatesByItself(Trainer):
    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return model(**inputs).loss, None, None


def test_a_training_step_that_calls_the_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedVersionError, match=r"CallsTheModel\.training_step calls the"):
        train(tmp_path, prepare=attach, trainer_class=CallsTheModel)


def test_a_prediction_step_that_calls_the_model_is_counted(tmp_path: Path) -> None:
    held = Dataset.from_list(make_records(10, seed=1))

    def evaluated(kind: type[Trainer]) -> dict[str, float]:
        trainer = train(
            tmp_path, prepare=attach, trainer_class=kind, trainer_arguments={"eval_dataset": held}
        )
        found: dict[str, float] = trainer.evaluate()
        return {key: value for key, value in found.items() if "_tokens" in key or "_loss" in key}

    found = evaluated(EvaluatesByItself)
    assert found == pytest.approx(evaluated(Trainer), rel=1e-6) and len(found) > 4


# ---- what the trainer does with its own metrics -----------------------------------------------


@pytest.mark.parametrize("own_metrics", [False, True])
def test_the_default_objective_of_a_search_is_the_one_without_us(
    own_metrics: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_hf_totals import TwoTrials
    from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
    from transformers.trainer_utils import HPSearchBackend

    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, TwoTrials)
    held = Dataset.from_list(make_records(10, seed=1))
    arguments: dict[str, Any] = {"eval_dataset": held}
    if own_metrics:
        arguments["compute_metrics"] = lambda _: {"good": 0.25}
    trainer = train(tmp_path, prepare=attach, trainer_arguments=arguments)
    trainer.model_init = lambda _trial=None: tiny_model()
    trainer.hyperparameter_search(lambda _: {}, n_trials=2, backend="optuna")
    metrics = trainer.evaluate()
    assert metrics["eval_bbu_loss"] > 0
    expected = 0.25 if own_metrics else metrics["eval_loss"]
    assert trainer.compute_objective(dict(metrics)) == pytest.approx(expected)
    chosen = itemgetter("eval_bbu_loss")
    trainer.hyperparameter_search(
        lambda _: {}, compute_objective=chosen, n_trials=2, backend="optuna"
    )
    assert trainer.compute_objective(metrics) == metrics["eval_bbu_loss"]


def test_on_error_does_not_end_a_run_that_is_left_alone(tmp_path: Path) -> None:
    config = MetricsConfig(on_error="raise")
    trainer = train(
        tmp_path,
        prepare=lambda trainer: attach(trainer, config, whole_script=True),
        model=classifier(2),
        logging_steps=1,
        trainer_arguments={"data_collator": classes},
    )
    assert trainer.state.global_step == 4 and not channel_logs(trainer)
