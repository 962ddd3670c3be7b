"""A training that ends by `kill -9` in the middle of a window."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from fork_server import Job
from hf_tools import make_records, tiny_model, train

from channel_metrics.trainers.hf import attach

# Checkpoints at 3 and 6, windows that end at 2, 4, 6: the process dies in step 6, with a window
# open since step 5 and a checkpoint written in the middle of another.
STEPS: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_steps": 2,
    "max_steps": 8,
}
DEADLY_STEP = 6


def ending(trainer: Any) -> None:
    attach(trainer)
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if trainer.state.global_step == DEADLY_STEP - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    trainer.training_step = training_step


def main(job: Job, rank: int) -> int:
    """A job of `fork_server`; its folder has a folder `out`."""
    model = tiny_model(attention_dropout=0.0)
    out = Path(job["folder"]) / "out"
    train(out, prepare=ending, model=model, records=make_records(64), **STEPS)
    return 0
