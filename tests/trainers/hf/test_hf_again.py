"""One trainer, several runs and several sessions: nothing of the last one is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faults
import pytest
from datasets import Dataset
from hf_tools import CHANNELS, channel_logs, expected_metrics, make_records, token_table, train
from transformers import Trainer

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach, detach


def test_a_fault_ends_the_metrics_of_one_run_only(tmp_path: Path) -> None:
    def break_off(trainer: Trainer) -> None:
        attach(trainer, MetricsConfig(on_error="warn"))
        with faults.inject("record a micro-batch"):
            trainer.train()
        assert not channel_logs(trainer)

    trainer = train(tmp_path, prepare=break_off)
    assert len(channel_logs(trainer)) == 2


def test_an_error_of_the_set_up_is_raised_in_each_run(tmp_path: Path) -> None:
    """The windows of the run before say nothing of this one."""
    trainer = train(tmp_path, prepare=attach)
    assert channel_logs(trainer)
    with faults.inject("record a micro-batch"), pytest.raises(ZeroDivisionError):
        trainer.train()


def test_loaders_that_are_kept_belong_to_one_session(tmp_path: Path) -> None:
    """transformers keeps the loader of an evaluation whose workers are persistent."""
    records = make_records(8)

    def prepare(trainer: Any) -> None:
        trainer.evaluate()
        attach(trainer, MetricsConfig(channels=CHANNELS))
        trainer.evaluate()
        # The ids of the old session mean other channels in this one.
        attach(trainer, MetricsConfig(channels=CHANNELS[::-1]))
        table = token_table(trainer.model, records)
        wanted = expected_metrics(table, [[r["input_ids"] for r in records]], "eval_")
        found = trainer.evaluate()
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
        detach(trainer)
        assert "eval_bbu_loss" not in trainer.evaluate()

    train(
        tmp_path,
        prepare=prepare,
        max_steps=1,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        trainer_arguments={"eval_dataset": Dataset.from_list(records)},
    )
