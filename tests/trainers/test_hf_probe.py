"""Probes in a Trainer: the values are those of a naive loop, and training does not notice them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_probe_tools import (
    EVAL_BATCH_SIZE,
    Keeper,
    draw_and_keep,
    expected_values,
    other_logs,
    probe_logs,
    random_numbers,
    restless_model,
)
from hf_tools import PaddingCollator, Record, make_records, tiny_model, train
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from channel_metrics import ChannelMetricsError, ConfigError, MetricsConfig
from channel_metrics.probe import ProbeConfig, choose
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.hf_probe import DatasetMetricsCallback
from channel_metrics.trainers.hf_undisturbed import undisturbed

CANARY = make_records(7, seed=11)
HELD_OUT = make_records(30, seed=12)


def probe_of(**options: Any) -> DatasetMetricsCallback:
    sources = options.pop("sources", {"canary": CANARY, "held_out": HELD_OUT})
    return DatasetMetricsCallback(
        sources, **{"every": 2, "batches": 2, "max_overhead": None} | options
    )


def run(
    folder: Path,
    *callbacks: TrainerCallback,
    metrics_on: bool = False,
    **arguments: Any,
) -> Trainer:
    def prepare(trainer: Trainer) -> None:
        if metrics_on:
            attach(trainer)
        for callback in callbacks:
            trainer.add_callback(callback)

    return train(folder, prepare=prepare, **{"max_steps": 5} | arguments)


def chosen(name: str, records: list[Record]) -> list[Record]:
    indices = choose(len(records), 2 * EVAL_BATCH_SIZE, seed=0, name=name)
    return [records[index] for index in indices]


def check_values(logs: dict[str, float], model: Any) -> None:
    expected = expected_values(model, "canary", CANARY)
    expected |= expected_values(model, "held_out", chosen("held_out", HELD_OUT))
    assert logs == pytest.approx(expected, rel=1e-5, abs=1e-7)


# ---- values ---------------------------------------------------------------------------------


def test_values_are_those_of_a_naive_loop(tmp_path: Path) -> None:
    keeper = Keeper()
    trainer = run(tmp_path, probe_of(), keeper)
    logs = probe_logs(trainer.state.log_history)
    # The start, every second step, and the end.
    assert list(logs) == [0, 2, 4, 5]
    for step, values in logs.items():
        model = tiny_model()
        model.load_state_dict(keeper.states[step])
        check_values(values, model)
    entries = [entry for entry in trainer.state.log_history if "probe_every" in entry]
    assert "probe_overhead" not in entries[0]
    assert all(entry["probe_overhead"] > 0 for entry in entries[1:])
    assert all(entry["probe_every"] == 2 for entry in entries)


@pytest.mark.parametrize(
    "arguments",
    [
        {"remove_unused_columns": False, "metrics_on": True},
        {"bf16": False, "label_smoothing_factor": 0.1},
        {"trainer_arguments": {"data_collator": PaddingCollator(left=True)}},
        {
            "trainer_arguments": {
                "data_collator": DataCollatorWithFlattening(return_flash_attn_kwargs=False)
            }
        },
    ],
    ids=["all columns", "label smoothing", "left", "flattened"],
)
def test_values_in_other_batches(tmp_path: Path, arguments: dict[str, Any]) -> None:
    trainer = run(tmp_path, probe_of(), max_steps=1, learning_rate=0.0, **arguments)
    logs = probe_logs(trainer.state.log_history)
    assert list(logs) == [0, 1]
    for values in logs.values():
        check_values(values, tiny_model())


def test_a_file_whose_records_are_encoded(tmp_path: Path) -> None:
    path = tmp_path / "canary.jsonl"
    path.write_text("".join(json.dumps({"tokens": record}) + "\n" for record in CANARY))
    probe = probe_of(sources={"canary": path}, encode=lambda record: record["tokens"])
    trainer = run(tmp_path, probe, max_steps=1)
    expected = expected_values(tiny_model(), "canary", CANARY)
    assert probe_logs(trainer.state.log_history)[0] == pytest.approx(expected, rel=1e-5)


def test_samples_are_the_same_at_every_probe_or_drawn_anew(tmp_path: Path) -> None:
    def curve(**options: Any) -> list[float]:
        probe = probe_of(sources={"x": Dataset.from_list(HELD_OUT)}, every=1, **options)
        trainer = run(tmp_path, probe, max_steps=3, learning_rate=0.0)
        logs = probe_logs(trainer.state.log_history)
        return [values["dataset_x_loss"] for values in logs.values()]

    fixed, anew = curve(), curve(resample=True)
    assert len(set(fixed)) == 1 and len(set(anew)) == 4
    assert anew == curve(resample=True)
    assert curve(seed=1)[0] != fixed[0]


def test_one_sequence_has_no_interval_and_nan_is_counted(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].lm_head.weight.data.fill_(float("nan"))

    record = next(record for record in CANARY if record["labels"].count(-100) < 5)
    probe = probe_of(sources={"x": [record]})
    trainer = run(tmp_path, probe, Broken(), max_steps=1)
    logs = probe_logs(trainer.state.log_history)
    assert set(logs[0]) == {"dataset_x_loss", "dataset_x_token_acc"}
    supervised = sum(label != -100 for label in record["labels"][1:])
    assert logs[1]["dataset_x_nonfinite"] == supervised
    assert "dataset_x_loss" not in logs[1]


# ---- when -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"at_start": False, "at_end": False}, [2, 4]),
        ({"every": 10}, [0, 5]),
        ({"every": 5}, [0, 5]),
    ],
)
def test_start_and_end(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    trainer = run(tmp_path, probe_of(**options))
    assert list(probe_logs(trainer.state.log_history)) == steps


def test_a_run_that_is_stopped_early_and_goes_on(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == 3

    saves = {"save_strategy": "steps", "save_steps": 1}
    trainer = run(tmp_path, probe_of(), Stop(), max_steps=6, **saves)
    assert list(probe_logs(trainer.state.log_history)) == [0, 2, 3]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # Step 3 was measured after its checkpoint; step 0 is not measured again.
    assert list(probe_logs(trainer.state.log_history)) == [0, 2, 4, 6]


class Clock:
    """Time in which a training step takes 1 second and a forward of a probe 3."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def watch(self, trainer: Trainer) -> None:
        def passed(model: Any, *_: Any) -> None:
            self.now += 1.0 if model.training else 3.0

        trainer.model.register_forward_hook(passed)


def test_the_budget_stretches_the_distance(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    probe = probe_of(sources={"canary": CANARY}, max_overhead=0.25, batches=1)
    probe._clock = clock

    def prepare(trainer: Trainer) -> None:
        clock.watch(trainer)
        trainer.add_callback(probe)

    with caplog.at_level(logging.WARNING, logger="channel_metrics"):
        trainer = train(tmp_path, prepare=prepare, max_steps=51)
    entries = [entry for entry in trainer.state.log_history if "probe_every" in entry]
    # The first two before a step was measured; then (3 + 3 + 3) / 0.25 = 36 steps, and so on.
    assert [entry["step"] for entry in entries] == [0, 2, 36, 48, 51]
    overheads = [entry.get("probe_overhead") for entry in entries]
    assert overheads == pytest.approx([None, 6 / 2, 9 / 36, 12 / 48, 15 / 51])
    assert [entry["probe_every"] for entry in entries] == [2, 34, 12, 12, 22]
    warned = [record.message for record in caplog.records if "max_overhead" in record.message]
    assert len(warned) == 1 and "every 2 steps" in warned[0]


# ---- without a trace ------------------------------------------------------------------------


class Freeze(TrainerCallback):
    """Somebody puts a submodule into evaluation mode, before the probe."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].model.embed_tokens.eval()


class Modes(TrainerCallback):
    """The mode of every submodule after each step, after the probe."""

    def __init__(self) -> None:
        self.seen: list[list[bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append([module.training for module in kwargs["model"].modules()])


def trace(folder: Path, probe: DatasetMetricsCallback | None, **arguments: Any) -> dict[str, Any]:
    """All that a training leaves behind."""
    modes = Modes()
    callbacks = [Freeze(), modes] if probe is None else [Freeze(), probe, modes]
    trainer = run(folder, *callbacks, logging_steps=1, **arguments)
    assert {len(set(seen)) for seen in modes.seen} == {2}
    assert torch.is_autocast_cache_enabled()
    left = trainer.optimizer.state_dict()["state"].values()
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "gradients": [parameter.grad for parameter in trainer.model.parameters()],
        "optimizer": [value for state in left for value in state.values()],
        "logs": other_logs(trainer.state.log_history),
        "batches": getattr(trainer.data_collator, "batches", None),
        "modes": modes.seen,
        "random": random_numbers(),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 3, "metrics_on": True},
        {"dataloader_num_workers": 2},
        {"model": restless_model, "gradient_accumulation_steps": 2},
        {"bf16": True, "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["dropout", "accumulation, attach", "workers", "buffers", "bf16, evaluation"],
)
def test_training_is_as_if_the_probe_had_never_run(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    def run_one(probe: DatasetMetricsCallback | None) -> dict[str, Any]:
        made: Callable[[], Any] | None = arguments.get("model")
        more = {"model": made()} if made else {}
        held_out = Dataset.from_list(make_records(6, seed=2))
        data = {"trainer_arguments": {"eval_dataset": held_out, "data_collator": PaddingCollator()}}
        return trace(tmp_path, probe, **arguments | more | data)

    without = run_one(None)
    probed = run_one(probe_of(every=1, encode=draw_and_keep, resample=True))
    torch.testing.assert_close(probed, without, rtol=0, atol=0)


# ---- refused --------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    """Records without a length."""

    def __iter__(self) -> Any:
        return iter(CANARY)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "sources of a probe must be a mapping"),
        ([CANARY], "sources of a probe must be a mapping"),
        ({"x": []}, "'x' of the probe is empty"),
        ({"x": Stream()}, "'x' of the probe must be a path .* is a Stream"),
        (
            {"x": {"train": CANARY}},
            "must be one dataset, but is a mapping of train;",
        ),
        ({"x": "nowhere.jsonl"}, "'x' of the probe: .*nowhere.jsonl does not exist"),
        ({"a b": CANARY, "a_b": CANARY}, "'a b' and 'a_b'"),
    ],
)
def test_sources_that_cannot_be_measured(sources: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DatasetMetricsCallback(sources)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "canary.jsonl"
    path.write_text('{"input_ids": [1]}\nnonsense\n')
    with pytest.raises(ConfigError, match=r"canary.jsonl:2: expected one JSON object"):
        DatasetMetricsCallback({"canary": path})


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="every must be a whole number of at least 1, but is 0"):
        DatasetMetricsCallback({"x": CANARY}, every=0)
    with pytest.raises(ConfigError, match="unknown key 'evry' in the probe; did you mean 'every'"):
        DatasetMetricsCallback({"x": CANARY}, evry=2)
    assert DatasetMetricsCallback({"x": CANARY}, ProbeConfig(every=3), batches=2).config == (
        ProbeConfig(every=3, batches=2)
    )


def without_labels(features: list[Any]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([feature["input_ids"][:2] for feature in features])}


UNSUPERVISED = [{**record, "labels": [-100] * len(record["labels"])} for record in CANARY]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {"x": UNSUPERVISED}}, "no token of the 7 samples of dataset 'x'"),
        ({"collator": without_labels}, "'canary' of the probe must have `labels`, .* input_ids"),
    ],
)
def test_batches_that_say_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, probe_of(**options))


def test_a_collator_that_cannot_be_copied(tmp_path: Path) -> None:
    class Locked(PaddingCollator):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("a lock cannot be copied")

    more = {"trainer_arguments": {"data_collator": Locked()}}
    with pytest.raises(ConfigError, match=r"Locked.* cannot be copied .a lock.* `collator`"):
        run(tmp_path, probe_of(), **more)
    trainer = run(tmp_path, probe_of(collator=PaddingCollator()), max_steps=1, **more)
    assert list(probe_logs(trainer.state.log_history)) == [0, 1]


def test_a_callback_without_its_trainer() -> None:
    with pytest.raises(ConfigError, match="expected to be called by a transformers Trainer"):
        probe_of().on_train_begin(None, None, None)


def run_with_channel(folder: Path, channel: str, config: MetricsConfig | None = None) -> None:
    def prepare(trainer: Trainer) -> None:
        attach(trainer, config)
        trainer.add_callback(probe_of())

    records = [{**record, "channel": channel} for record in make_records(16)]
    train(folder, prepare=prepare, records=records)


def test_keys_that_a_channel_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"channel 'dataset_canary' .* 'dataset_canary_loss'"):
        run_with_channel(tmp_path, "dataset_canary")
    config = MetricsConfig(key_format="dataset_{channel}_{metric}")
    with pytest.raises(ConfigError, match=r"channel 'canary' .* 'dataset_canary_loss'"):
        run_with_channel(tmp_path, "canary", config)


def test_keys_that_a_later_channel_has(tmp_path: Path) -> None:
    class MapStyle(torch.utils.data.Dataset):
        """Its channels are met on the way."""

        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Record:
            return {**make_records(16)[index], "channel": "dataset_canary"}

    def prepare(trainer: Trainer) -> None:
        attach(trainer)
        trainer.add_callback(probe_of())

    with pytest.raises(ConfigError, match="'dataset_canary_loss', which is the trainer's own"):
        train(tmp_path, prepare=prepare, records=MapStyle())


def test_keys_that_somebody_else_logs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'dataset_canary_loss' of a probe is also logged by"):
        run(tmp_path, probe_of(), probe_of(sources={"canary": CANARY}))


# ---- errors on the way ----------------------------------------------------------------------


def test_an_error_can_end_the_probe_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run_one(*probes: DatasetMetricsCallback) -> dict[str, Any]:
        def fail(model: Any, *_: Any) -> None:
            if not model.training:
                forwards.append(1)
                if len(forwards) > 8:
                    raise ZeroDivisionError("no forward today")

        def prepare(trainer: Trainer) -> None:
            trainer.model.register_forward_pre_hook(fail)
            for probe in probes:
                trainer.add_callback(probe)

        forwards: list[int] = []
        trainer = train(tmp_path, prepare=prepare, max_steps=6, logging_steps=1)
        return {
            "weights": trainer.model.state_dict(),
            "logs": other_logs(trainer.state.log_history),
            "probed": list(probe_logs(trainer.state.log_history)),
            "modes": [module.training for module in trainer.model.modules()],
        }

    without = run_one()
    with caplog.at_level(logging.WARNING, logger="channel_metrics"):
        warned = run_one(probe_of(on_error="warn"))
    assert warned.pop("probed") == [0, 2] and without.pop("probed") == []
    torch.testing.assert_close(warned, without, rtol=0, atol=0)
    assert sum("no forward today" in record.message for record in caplog.records) == 1
    with pytest.raises(ZeroDivisionError):
        run_one(probe_of())


class BigBuffer(torch.nn.Module):
    """A buffer too large to be copied, which forwards may change."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(5 * 2**20))
        self.changes = changes

    def forward(self) -> None:
        if self.changes:
            self.table[0] += 1


def test_a_large_buffer_that_cannot_be_put_back() -> None:
    model = BigBuffer(changes=False)
    with undisturbed(model):
        model()
    model.changes = True
    message = r"the buffer 'table' of a BigBuffer .20 MiB."
    with pytest.raises(ChannelMetricsError, match=message), undisturbed(model):
        model()


# ---- TRL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics_on", [False, True])
def test_windows_of_trl_stay_open(tmp_path: Path, metrics_on: bool) -> None:
    """TRL's own metrics of a window, such as its accuracy, are not closed by the probe's log."""
    from trl_sft_tools import sft
    from trl_tools import token_records

    records = token_records(9, seed=1)

    def run_one(*probes: DatasetMetricsCallback) -> Trainer:
        def prepare(trainer: Trainer) -> None:
            if metrics_on:
                attach(trainer)
            for probe in probes:
                trainer.add_callback(probe)

        trainer: Trainer = sft(tmp_path, records=token_records(48), prepare=prepare)
        return trainer

    without = run_one()
    probed = run_one(probe_of(sources={"x": records}, every=1))
    assert other_logs(probed.state.log_history) == other_logs(without.state.log_history)
    torch.testing.assert_close(
        probed.model.state_dict(), without.model.state_dict(), rtol=0, atol=0
    )
    logs = probe_logs(probed.state.log_history)
    assert list(logs) == [0, 1, 2, 3, 4]
    picked = [records[index] for index in choose(9, 2 * EVAL_BATCH_SIZE, seed=0, name="x")]
    full = [{**record, "labels": record["input_ids"]} for record in picked]
    expected = expected_values(probed.model, "x", full)
    assert logs[4] == pytest.approx(expected, rel=1e-5, abs=1e-7)
