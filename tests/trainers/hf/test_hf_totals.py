"""Totals in the files of checkpoints: of absent channels, of trials, on a full disk."""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_tools import (
    PaddingCollator,
    make_records,
    tiny_model,
    train,
)
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers import hyperparameter_search as search
from transformers.trainer_utils import BestRun, HPSearchBackend

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach

RECORDS = make_records(64)
TOTALS = MetricsConfig(metrics=("tokens", "samples", "tokens_total", "samples_total"))
FILE = "channel_metrics.json"
OF_IDS = {tuple(record["input_ids"]): record for record in RECORDS}


def counted(batches: list[Any]) -> dict[str, dict[str, int]]:
    """{channel: totals} of the records in `batches`, by counting."""
    tokens: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for record in (OF_IDS[tuple(ids)] for batch in batches for ids in batch):
        tokens[record["channel"]] += sum(label != -100 for label in record["labels"][1:])
        samples[record["channel"]] += 1
    return {n: {"tokens_total": tokens[n], "samples_total": samples[n]} for n in samples}


def in_file(folder: Path, step: int) -> Any:
    return json.loads((folder / f"checkpoint-{step}" / FILE).read_text())["channels"]


def test_a_channel_that_is_absent_from_a_window_keeps_its_totals(tmp_path: Path) -> None:
    """Eight windows of one step of two records: most lack some channel, which comes back later."""
    options: dict[str, Any] = {"max_steps": 8, "logging_steps": 1, "per_device_train_batch_size": 2}
    runs = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-3"))):
        collator = PaddingCollator()

        def prepare(trainer: Any, resume: str | None = resume) -> None:
            attach(trainer, TOTALS)
            trainer.train = partial(trainer.train, resume_from_checkpoint=resume)

        trainer = train(
            tmp_path / name,
            prepare=prepare,
            model=tiny_model(attention_dropout=0.0),
            records=RECORDS,
            save_strategy="steps",
            save_steps=3,
            trainer_arguments={"data_collator": collator},
            **options,
        )
        runs.append((trainer, collator.batches))
    (whole, batches), (resumed, _) = runs
    came_back = False
    for trainer, first in ((whole, 1), (resumed, 4)):
        entries = {e["step"]: e for e in trainer.state.log_history if "grad_norm" in e}
        for step in range(first, 9):
            here, so_far = counted(batches[step - 1 : step]), counted(batches[:step])
            want = {f"{n}_{key}": so_far[n][key] for n in here for key in so_far[n]}
            assert {k: v for k, v in entries[step].items() if k.endswith("_total")} == want
            before = counted(batches[max(step - 2, 0) : step - 1])
            earlier = counted(batches[: max(step - 2, 0)])
            came_back |= step > 3 and any(n in earlier and n not in before for n in here)
    assert came_back
    for step in (3, 6):
        assert in_file(tmp_path / "whole", step) == counted(batches[:step])
        # Absent from the window that the checkpoint ends.
        assert counted(batches[:step]).keys() > counted(batches[step - 1 : step]).keys()
    assert in_file(tmp_path / "resumed", 6) == in_file(tmp_path / "whole", 6)


class Trial(dict[str, Any]):
    """Numbered, as those of optuna; and a dict, which transformers takes for one of wandb."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.params: dict[str, Any] = {}


class TwoTrials(search.HyperParamSearchBackendBase):
    """What the backend for optuna does of the trainer, without optuna."""

    name = "optuna"

    @staticmethod
    def is_available() -> bool:
        return True

    def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
        for number in range(n_trials):
            trainer.train(trial=Trial(number))
        return BestRun("0", 0.0, {})


def test_every_trial_of_a_search_has_its_own_totals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = search.ALL_HYPERPARAMETER_SEARCH_BACKENDS
    monkeypatch.setitem(backends, HPSearchBackend.OPTUNA, TwoTrials)
    collator = PaddingCollator()
    trainer = attach(
        Trainer(
            model_init=lambda _trial=None: tiny_model(attention_dropout=0.0),
            args=TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=3,
                per_device_train_batch_size=4,
                logging_steps=2,
                save_strategy="steps",
                save_steps=3,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(RECORDS),
            data_collator=collator,
        ),
        TOTALS,
    )
    ends = []

    class Counted(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(len(collator.batches))

    trainer.add_callback(Counted())
    set_seed(0)
    trainer.hyperparameter_search(lambda _trial: {}, n_trials=2, backend="optuna")
    assert len(ends) == 2
    for number, start in enumerate(ends):
        found = in_file(tmp_path / f"run-{number}", 3)
        assert found == counted(collator.batches[start : start + 3])
    assert not list(tmp_path.glob("checkpoint-*"))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Nothing can be written behind the first `size` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_totals_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    """The disk is full in the middle of the file, in a second run in the same folder."""
    steps: dict[str, Any] = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 100,
    }
    train(tmp_path, prepare=lambda t: attach(t, TOTALS), records=RECORDS, **steps)
    before = (tmp_path / "checkpoint-2" / FILE).read_bytes()
    limit = full_disk(len(before) // 2)

    class Full(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                limit.__enter__()

    def prepare(trainer: Any) -> None:
        attach(trainer, TOTALS)
        trainer.add_callback(Full())

    try:
        with pytest.raises(OSError, match="File too large"):
            train(tmp_path, prepare=prepare, records=make_records(64, seed=3), **steps)
    finally:
        limit.__exit__(None, None, None)
    assert (tmp_path / "checkpoint-2" / FILE).read_bytes() == before
