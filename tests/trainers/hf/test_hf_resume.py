"""Totals go on exactly where a checkpoint was written, whatever happened after it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hf_case_tools import HF, ddp, ddp4, told
from hf_case_tools import run as run_ranks
from hf_killed import STEPS
from hf_tools import PaddingCollator, Record, make_records, tiny_model, train
from rank_cases import RanksOf
from transformers import Trainer

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach

CONFIG = MetricsConfig(metrics=("tokens", "samples", "tokens_total", "samples_total"))
FILE = "channel_metrics.json"


def run(folder: Path, resume: str | None = None, **arguments: Any) -> tuple[Any, Any]:
    """A training, and the batches that its collator saw."""
    collator = PaddingCollator()

    def prepare(trainer: Any) -> None:
        attach(trainer, CONFIG)
        trainer.train = partial(trainer.train, resume_from_checkpoint=resume)

    given: dict[str, Any] = {"records": make_records(64), **STEPS, **arguments}
    trainer = train(
        folder,
        prepare=prepare,
        model=tiny_model(attention_dropout=0.0),
        trainer_arguments={"data_collator": collator},
        **given,
    )
    return trainer, collator.batches


def counted(records: list[Record], batches: list[Any]) -> dict[str, dict[str, int]]:
    """{channel: totals} of the records in `batches`, by counting."""
    by_ids = {tuple(record["input_ids"]): record for record in records}
    tokens: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for batch in batches:
        for ids in batch:
            record = by_ids[tuple(ids)]
            tokens[record["channel"]] += sum(label != -100 for label in record["labels"][1:])
            samples[record["channel"]] += 1
    return {n: {"tokens_total": tokens[n], "samples_total": samples[n]} for n in samples}


def totals(trainer: Any) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = trainer.channel_metrics.totals.state_dict()["channels"]
    return found


def in_checkpoint(folder: Path, step: int) -> Any:
    return json.loads((folder / f"checkpoint-{step}" / FILE).read_text())["channels"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, Any]:
    """Eight steps at one go."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, batches = run(folder)
    return folder, trainer, batches


def test_totals_are_in_every_checkpoint(whole: Any) -> None:
    folder, trainer, batches = whole
    records = make_records(64)
    # At step 3, the window since step 2 is open: it is in the file, and was logged later.
    for step in (3, 6):
        assert in_checkpoint(folder, step) == counted(records, batches[:step])
    assert totals(trainer) == counted(records, batches[:8])
    last = trainer.state.log_history[-2]
    assert last["step"] == 8
    assert last["rru_tokens_total"] == totals(trainer)["rru"]["tokens_total"]


def check_continued(trainer: Trainer, whole: Any, start: int) -> None:
    _, first, batches = whole
    assert totals(trainer) == totals(first)
    expected = [e for e in first.state.log_history if e["step"] > start]
    found = [e for e in trainer.state.log_history if e["step"] > start]
    for entry, wanted in zip(found, expected, strict=True):
        logged = {key: value for key, value in entry.items() if key.endswith("_total")}
        # The first window is shorter, and may lack a channel; what it has is the same.
        assert logged.items() <= wanted.items()
        assert logged or "train_loss" in entry
        if entry["step"] > start + 1:
            assert logged == {k: v for k, v in wanted.items() if k.endswith("_total")}
    # The window that was open at the checkpoint is not opened again: it is in the totals.
    step_4 = next(entry for entry in found if entry["step"] == start + 1)
    alone = counted(make_records(64), batches[start : start + 1])
    assert {k: v for k, v in step_4.items() if k.endswith("_tokens")} == {
        f"{name}_tokens": value["tokens_total"] for name, value in alone.items()
    }


def test_resume_goes_on_exactly(tmp_path: Path, whole: Any) -> None:
    trainer, _ = run(tmp_path, resume=str(whole[0] / "checkpoint-3"))
    check_continued(trainer, whole, start=3)


def test_resume_after_kill_9(tmp_path: Path, whole: Any, ranks_of: RanksOf) -> None:
    job: dict[str, Any] = {"ranks": 1, "meet": False, "timeout": 120}
    assert ranks_of.server(HF).ask(tmp_path, "hf_killed:main", **job)["codes"] == [-9]
    folder = tmp_path / "out"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    # Steps 4 to 6 were trained, and 4 was logged, by the process that died: they count once.
    trainer, _ = run(folder, resume=str(folder / "checkpoint-3"))
    check_continued(trainer, whole, start=3)


def test_other_channels(tmp_path: Path, whole: Any) -> None:
    records = make_records(64, seed=9, channels=("bbu", "fresh"))
    trainer, batches = run(
        tmp_path,
        resume=str(whole[0] / "checkpoint-3"),
        records=records,
        ignore_data_skip=True,
    )
    expected = counted(make_records(64), whole[2][:3])
    for name, more in counted(records, batches[:5]).items():
        before = expected.get(name, {"tokens_total": 0, "samples_total": 0})
        expected[name] = {key: before[key] + more[key] for key in more}
    assert totals(trainer) == expected
    assert in_checkpoint(tmp_path, 6).keys() >= {"bbu", "fresh", "rru", "lvis", "lang_chat"}
    last = trainer.state.log_history[-2]
    assert last["fresh_tokens_total"] == expected["fresh"]["tokens_total"]
    # A channel that is no longer in the data is kept, and logged no more.
    assert "rru_tokens_total" not in last


def test_an_old_checkpoint_starts_at_zero(
    tmp_path: Path, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    old = shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (old / FILE).unlink()
    trainer, _ = run(tmp_path, resume=str(old))
    assert f"{old} has no {FILE}" in caplog.text
    assert totals(trainer) == counted(make_records(64), whole[2][3:8])


def test_a_new_training_starts_at_zero(tmp_path: Path) -> None:
    trainer, batches = run(tmp_path, max_steps=2)
    type(trainer).train(trainer)
    assert totals(trainer) == counted(make_records(64), batches[-3:-1])


@ddp
def resume_first(folder: Path) -> Any:
    config = MetricsConfig(metrics=("tokens", "tokens_total", "samples_total"))
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    return told(run_ranks(folder, config=config, records=make_records(64), **arguments))


@ddp4
def resume_four(folder: Path) -> Any:
    """Goes on where two ranks stopped, with other channels in the data."""
    config = MetricsConfig(metrics=("tokens", "tokens_total", "samples_total"))
    records = make_records(64, seed=5, channels=("bbu", "fresh"))
    checkpoint = folder.parent / "resume_first" / "checkpoint-3"
    trainer = run_ranks(
        folder,
        config=config,
        records=records,
        prepare=lambda trainer: _train_from(trainer, str(checkpoint)),
        max_steps=5,
        logging_steps=2,
        ignore_data_skip=True,
    )
    return told(trainer, totals=trainer.channel_metrics.totals.state_dict()["channels"])


def _train_from(trainer: Any, checkpoint: str) -> None:
    train = trainer.train
    trainer.train = lambda: train(resume_from_checkpoint=checkpoint)


def test_another_number_of_ranks(ranks_of: RanksOf) -> None:
    """Two ranks write a checkpoint at step 3, four go on from it, with other channels."""
    first, second = ranks_of(resume_first), ranks_of(resume_four)
    fresh = make_records(64, seed=5, channels=("bbu", "fresh"))
    expected = counted(make_records(64), [b for rank in first for b in rank["batches"][:3]])
    for name, more in counted(fresh, [b for r in second for b in r["batches"][:2]]).items():
        before = expected.get(name, {"tokens_total": 0, "samples_total": 0})
        expected[name] = {key: before[key] + more[key] for key in more}
    assert len(second) == 4
    for rank in second:
        assert rank["totals"] == expected
