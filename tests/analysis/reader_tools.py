"""A history, and what a run that was read from it must hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analysis.analysis_tools import (
    CHANNELS,
    Entry,
    expected_series,
    log_key,
    make_history,
    series_of,
)
from channel_metrics.analysis.run import Run

HISTORY = make_history()


def check(run: Run, history: list[Entry], rel: float = 0.0) -> None:
    """The run holds the channels of the history, all values, and no others."""
    assert set(run.channels()) == set(CHANNELS)
    found = {log_key(key) for key in run.keys if key.channel or key.metric == "loss"}
    written = {k for e in history for k in e if k not in ("step", "grad_norm")}
    assert found == written
    for key in run.keys:
        expected = expected_series(history, log_key(key))
        if key.channel or key.metric == "loss":
            assert series_of(run, key.channel, key.metric, key.split) == pytest.approx(
                expected, rel=rel, abs=0
            )


def tensorboard(folder: Path, history: list[Entry]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for entry in history:
            for key, value in entry.items():
                if key != "step":
                    eval_key = key.removeprefix("eval_")
                    tag = f"eval/{eval_key}" if eval_key != key else f"train/{key}"
                    writer.add_scalar(tag, value, entry["step"])
        writer.add_histogram("train/weights", torch.ones(2), 1)
        writer.add_text("train/note", "text", 1)
