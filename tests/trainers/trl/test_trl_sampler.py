"""A `MixedStream` of tokenised records in TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sampler_tools import CONFIG, check_draws, sources, values
from trl import SFTTrainer
from trl_sft_tools import sft

from channel_metrics import MixedStream
from channel_metrics.trainers.trl import attach

ROWS = 4


def test_a_stream_in_sft(tmp_path: Path) -> None:
    stream = MixedStream(sources(), batch_size=ROWS, lag=(2 * 2 + 1) * ROWS)

    def prepare(trainer: Any) -> None:
        attach(trainer, CONFIG)
        stream.follow(trainer.channel_metrics)

    trainer = sft(
        tmp_path,
        SFTTrainer,
        records=stream,
        prepare=prepare,
        # It has tokens already, and no columns that could be looked at.
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_accumulation_steps=1,
        max_steps=8,
        logging_steps=1,
        dataloader_num_workers=2,
    )
    found = values(entry for entry in trainer.state.log_history if "loss" in entry)
    check_draws(found, ROWS, (2 * 2 + 1) * ROWS)
