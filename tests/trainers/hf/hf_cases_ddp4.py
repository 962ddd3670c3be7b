"""Cases on four ranks of DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from hf_case_tools import cases_of, run, told
from hf_tools import make_records

from channel_metrics import MetricsConfig

WORLD_SIZE = 4
ENVIRON: dict[str, str] = {}


def four_ranks(folder: Path) -> Any:
    trainer = run(folder, records=make_records(64))
    sizes = {size: trainer.evaluate(_held_out(size)) for size in (3, 10, 17)}
    return told(trainer, evaluated=sizes)


def _held_out(size: int) -> Dataset:
    return Dataset.from_list(make_records(size, seed=size))


def resume_four(folder: Path) -> Any:
    """Goes on where two ranks stopped, with other channels in the data."""
    config = MetricsConfig(metrics=("tokens", "tokens_total", "samples_total"))
    records = make_records(64, seed=5, channels=("bbu", "fresh"))
    checkpoint = folder.parent / "resume_first" / "checkpoint-3"
    trainer = run(
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


CASES = cases_of(globals())
