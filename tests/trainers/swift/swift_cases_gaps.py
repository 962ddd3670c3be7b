"""Cases of ms-swift on one process that were in no test of the first ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import swift_tools
from hf_case_tools import cases_of
from swift_files import arguments, make_data, make_model

from channel_metrics import MetricsConfig

WORLD_SIZE = 1
ENVIRON: dict[str, str] = {}


def chosen_in_evaluation(folder: Path) -> Any:
    """Two steps, each with an evaluation, which logs two of four channels."""
    base = folder.parent / "swift_gaps"
    base.mkdir()
    data = make_data(base)["plain"]
    given = {
        "val_dataset": [f"{data}#29"],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "per_device_eval_batch_size": 4,
    }
    run = arguments(make_model(base / "model"), data, folder, **given)
    return swift_tools.both(run, MetricsConfig(eval_channels=("bbu", "lvis")))


CASES = cases_of(globals())
