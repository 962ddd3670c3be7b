"""Probes in a Trainer: the values are those of a naive loop, at the steps that were asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_probe_tools import (
    CANARY,
    EVAL_BATCH_SIZE,
    HELD_OUT,
    Keeper,
    add,
    expected_values,
    probe_logs,
    probe_of,
    run,
)
from hf_tools import PaddingCollator, Record, tiny_model, train
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from channel_metrics.probes.probe import ProbeConfig, choose
from channel_metrics.trainers.hf import attach_probe


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
        {"trainer_arguments": {"data_collator": DataCollatorWithFlattening()}},
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


def test_attached(tmp_path: Path) -> None:
    """`attach_probe` does all that is needed, and the probe can be taken off again."""
    probes = []

    def prepare(trainer: Trainer) -> None:
        probes.append(
            attach_probe(trainer, {"canary": CANARY}, ProbeConfig(every=5), max_overhead=None)
        )

    trainer = train(tmp_path, prepare=prepare, max_steps=5, learning_rate=0.0)
    logs = probe_logs(trainer.state.log_history)
    expected = expected_values(tiny_model(), "canary", CANARY)
    assert list(logs) == [0, 5]
    assert logs[5] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    trainer.remove_callback(probes[0])
    trainer.train()
    assert not probe_logs(trainer.state.log_history)


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

    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
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

    def watch(self, trainer: Any) -> None:
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
        add(trainer, probe)

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
