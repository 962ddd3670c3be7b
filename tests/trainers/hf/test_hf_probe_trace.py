"""A probe leaves no trace: training, its logs and its windows are as if it had never run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_probe_tools import (
    EVAL_BATCH_SIZE,
    add,
    draw_and_keep,
    expected_values,
    other_logs,
    probe_logs,
    probe_of,
    random_numbers,
    restless_model,
    run,
)
from hf_tools import PaddingCollator, make_records
from transformers import Trainer, TrainerCallback

from channel_metrics.probes.probe import choose
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.hf.probe import DatasetMetricsCallback


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


# ---- TRL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics_on", [False, True])
def test_windows_of_trl_stay_open(tmp_path: Path, metrics_on: bool) -> None:
    """TRL's own metrics of a window, such as its accuracy, are not closed by the probe's log."""
    from trl_sft_tools import sft
    from trl_tools import token_records

    records = token_records(9, seed=1)

    def run_one(*probes: DatasetMetricsCallback) -> Any:
        def prepare(trainer: Trainer) -> None:
            if metrics_on:
                attach(trainer)
            for probe in probes:
                add(trainer, probe, told=not metrics_on)

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
