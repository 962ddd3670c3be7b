"""The keys of evaluations that are known before training: `metric_for_best_model`, clashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_tools import (
    PaddingCollator,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
    train,
)
from transformers import Trainer, TrainingArguments

from channel_metrics import ChannelError, ConfigError, MetricsConfig
from channel_metrics.trainers.hf import attach

HELD = make_records(10, seed=1)
BEST: dict[str, Any] = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def of(*channels: str) -> Dataset:
    return Dataset.from_list([r for r in HELD if r["channel"] in channels])


def best(
    folder: Path,
    metric: str,
    held: Any = None,
    config: MetricsConfig | None = None,
    **given: Any,
) -> Any:
    """A run that keeps the checkpoint with the best `metric`."""
    return train(
        folder,
        prepare=lambda trainer: attach(trainer, config),
        metric_for_best_model=metric,
        trainer_arguments={"eval_dataset": held or Dataset.from_list(HELD), **given},
        **BEST,
    )


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("eval_lvis_loss", "eval_channels leaves out 'lvis'"),
        ("bbu_ppl", "add 'ppl' to `metrics`"),
        ("eval_macro_loss", "'macro_loss' is not among `metrics`"),
        ("bbu_los", "did you mean 'eval_bbu_loss'"),
        ("eval_ruu_loss", "did you mean 'eval_rru_loss'"),
    ],
)
def test_a_best_metric_that_is_never_logged_is_said_at_the_start(
    metric: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        best(tmp_path, metric, config=MetricsConfig(eval_channels=("bbu", "rru")))


def test_a_loss_that_is_better_if_greater_is_refused(tmp_path: Path) -> None:
    """transformers assumes this for names that do not end in `loss`."""
    chosen = MetricsConfig(metrics=("weighted_loss_of_channels",), channel_weights={"bbu": 1})
    with pytest.raises(ConfigError, match="a loss, but greater_is_better is True"):
        best(tmp_path, "eval_weighted_loss_of_channels", config=chosen)


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("eval_one_rru_loss", "this evaluation set has the channel 'rru': it holds bbu"),
        ("two_ruu_loss", "did you mean 'eval_two_rru_loss'"),
        ("two_rru_losss", "did you mean 'eval_two_rru_loss'"),
    ],
)
def test_each_evaluation_set_has_channels_of_its_own(
    metric: str, says: str, tmp_path: Path
) -> None:
    held = {"one": of("bbu"), "two": of("rru", "lvis")}
    with pytest.raises(ConfigError, match=says):
        best(tmp_path, metric, held)


@pytest.mark.parametrize("metric", ["eval_two_rru_loss", "two_lvis_loss", "eval_one_loss"])
def test_a_metric_of_one_evaluation_set_chooses_the_model(metric: str, tmp_path: Path) -> None:
    trainer = best(tmp_path, metric, {"one": of("bbu"), "two": of("rru", "lvis")})
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(values) == 2 and trainer.state.best_metric == min(values)


@pytest.mark.parametrize("metric", ["eval_lvis_loss", "eval_rru_los"])
def test_compute_metrics_may_give_any_key(metric: str, tmp_path: Path) -> None:
    trainer = best(
        tmp_path,
        metric,
        config=MetricsConfig(eval_channels=("bbu", "rru")),
        compute_metrics=lambda _: {metric.removeprefix("eval_"): 0.25},
    )
    assert trainer.state.best_metric == 0.25


class WithAKeyOfItsOwn(Trainer):
    """An evaluation of the script's, as libraries have them."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_aux_loss"] = 0.5
        return output


def test_a_key_that_is_not_like_ours_is_let_be(tmp_path: Path) -> None:
    trainer = train(
        tmp_path,
        prepare=attach,
        trainer_class=WithAKeyOfItsOwn,
        metric_for_best_model="aux_loss",
        trainer_arguments={"eval_dataset": Dataset.from_list(HELD)},
        **BEST,
    )
    assert trainer.state.best_metric == 0.5


# ---- one key, two meanings ---------------------------------------------------------------------


SETS = {"val": of("bbu", "rru"), "val_bbu": of("lvis")}


@pytest.mark.parametrize("order", [("val", "val_bbu"), ("val_bbu", "val")])
def test_the_loss_of_a_set_and_that_of_a_channel(order: tuple[str, str], tmp_path: Path) -> None:
    """`eval_val_bbu_loss` would be both."""
    with pytest.raises(ConfigError, match="logged as 'eval_val_bbu_loss', which is the trainer's"):
        best(tmp_path, "eval_val_bbu_loss", {name: SETS[name] for name in order})


@pytest.mark.parametrize("order", [("val", "val_bbu"), ("val_bbu", "val")])
def test_they_are_apart_if_the_channels_come_late(
    order: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a stream: the key is that of the set, and chooses the model."""
    trainer = train(
        tmp_path,
        prepare=attach,
        model=tiny_model(attention_dropout=0.0),
        records=Dataset.from_list(make_records(16)).to_iterable_dataset(),
        learning_rate=0.0,
        metric_for_best_model="eval_val_bbu_loss",
        trainer_arguments={
            "eval_dataset": {name: SETS[name].to_iterable_dataset() for name in order}
        },
        **BEST,
    )
    table = token_table(tiny_model(), HELD)

    def expected(name: str) -> dict[str, float]:
        ids = [record["input_ids"] for record in SETS[name]]
        return expected_metrics(table, [ids], prefix=f"eval_{name}_")

    of_set = expected("val_bbu")["eval_val_bbu_lvis_loss"]  # it holds nothing else
    assert trainer.state.best_metric == pytest.approx(of_set, rel=1e-5)
    found = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    assert found["eval_val_bbu_loss"] == pytest.approx(of_set, rel=1e-5)
    for name in order:
        ours = {k: v for k, v in expected(name).items() if k != "eval_val_bbu_loss"}
        assert {key: found[key] for key in ours} == pytest.approx(ours, rel=1e-5)
    said = [r.getMessage() for r in caplog.records if "'eval_val_bbu_loss'" in r.getMessage()]
    assert len(said) == 1 and "left out of the log" in said[0]


@pytest.mark.parametrize("order", [("val", "val_bbu"), ("val_bbu", "val")])
@pytest.mark.parametrize("given", [True, False])
def test_they_are_apart_in_an_evaluation_alone(
    order: tuple[str, str], given: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a training before; the sets are given to the trainer, or to `evaluate`."""
    sets = {name: SETS[name] for name in order}
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer: Any = attach(
        Trainer(
            tiny_model(),
            arguments,
            eval_dataset=None if given else sets,
            data_collator=PaddingCollator(),
        )
    )
    seen: list[dict[str, float]] = []
    log = trainer.log

    def remembering(logs: dict[str, float], *rest: Any) -> None:
        seen.append(dict(logs))
        log(logs, *rest)

    trainer.log = remembering
    metrics = trainer.evaluate(sets) if given else trainer.evaluate()
    assert metrics["eval_val_bbu_loss"] == pytest.approx(metrics["eval_val_bbu_lvis_loss"])
    assert [logs["eval_val_bbu_loss"] for logs in seen if "eval_val_bbu_loss" in logs] == [
        metrics["eval_val_bbu_loss"]
    ]
    assert "eval_val_bbu_tokens" in metrics and "eval_val_rru_loss" in metrics
    assert caplog.text.count("would be logged as 'eval_val_bbu_loss'") == 1


def test_a_key_of_a_prefix_of_ones_own(tmp_path: Path) -> None:
    """`chosen_loss` is that of the evaluation, so a channel `chosen` has none in training."""
    renamed = {"bbu": "chosen", "rru": "rru", "lvis": "lvis", "lang_chat": "lvis"}
    records = [r | {"channel": renamed[r["channel"]]} for r in make_records(16)]
    trainer = train(tmp_path, prepare=attach, records=records, max_steps=1, logging_steps=1)
    assert "chosen_loss" in trainer.state.log_history[0]
    held = Dataset.from_list(HELD)
    assert trainer.evaluate(held, metric_key_prefix="chosen")["chosen_loss"] > 0
    trainer.train()
    assert "chosen_loss" not in trainer.state.log_history[0]
    assert "chosen_tokens" in trainer.state.log_history[0]


def test_a_training_channel_with_the_name_of_an_evaluation(tmp_path: Path) -> None:
    """`eval_bbu` in training, `bbu` in evaluation: `eval_bbu_loss` would be both."""
    renamed = {"bbu": "bbu", "rru": "eval_bbu", "lvis": "lvis", "lang_chat": "lvis"}
    records = [r | {"channel": renamed[r["channel"]]} for r in make_records(32)]
    held = {"eval_dataset": Dataset.from_list(HELD)}
    says = "would both be logged as 'eval_bbu_(loss|token_acc|tokens|share)"
    with pytest.raises(ChannelError, match=says):
        train(
            tmp_path,
            prepare=attach,
            records=records,
            eval_strategy="epoch",
            trainer_arguments=held,
        )
    # Without an evaluation, they have keys of their own.
    trainer = train(tmp_path, prepare=attach, records=records, trainer_arguments=held)
    assert {"bbu_loss", "eval_bbu_loss"} <= set(trainer.state.log_history[1])


@pytest.mark.parametrize("key_format", ["{channel:.3}_{metric}", "{channel}_{metric:.1}"])
def test_a_format_that_cuts_names_is_refused(key_format: str) -> None:
    with pytest.raises(ConfigError, match="once and as they are"):
        MetricsConfig(key_format=key_format)


def test_a_typo_in_eval_channels_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'ruu', which is no channel; did you mean 'rru'"):
        train(
            tmp_path,
            prepare=lambda t: attach(t, MetricsConfig(eval_channels=("bbu", "ruu"))),
            trainer_arguments={"eval_dataset": Dataset.from_list(make_records(10, seed=1))},
        )


def test_the_loss_of_the_whole_set_is_no_typo(tmp_path: Path) -> None:
    """`eval_x_loss`, which is logged, is near to it."""
    held = Dataset.from_list([{**record, "channel": "x"} for record in HELD])
    trainer = best(tmp_path, "eval_loss", held)
    assert "eval_x_loss" in trainer.state.log_history[-2]
    assert trainer.state.best_metric == trainer.state.log_history[-2]["eval_loss"]


def test_a_stream_may_have_any_channel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its keys cannot be known before it is read: transformers says what is missing."""
    stream = Dataset.from_list(HELD).to_iterable_dataset()
    config = MetricsConfig(eval_channels=("bbu", "later"))
    with pytest.raises(KeyError, match="eval_bbu_los"):
        best(tmp_path, "eval_bbu_los", stream, config)
    assert "eval_channels names 'later', which is no channel" in caplog.text


def test_the_default_objective_has_no_key_of_ours_of_any_set(tmp_path: Path) -> None:
    """transformers adds up what it gets, with the metrics of all sets in one mapping."""
    held = {"one": of("bbu"), "two": of("rru")}
    trainer = train(tmp_path, prepare=attach, trainer_arguments={"eval_dataset": held})
    found = trainer.evaluate()
    assert {"eval_one_bbu_loss", "eval_two_rru_loss"} < found.keys()
    losses = found["eval_one_loss"] + found["eval_two_loss"]
    assert trainer._objective_without_channels(found) == pytest.approx(losses)
