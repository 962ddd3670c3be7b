"""One short run with every tracker at once, in a process of its own: they keep state per process.

    python trackers_run.py FOLDER

Everything stays in FOLDER, offline; `log_history.json` is what the trainer logged.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Records of lvis that only the last window reaches.
LAST = 6
TRACKERS = ("mlflow", "swanlab", "trackio", "wandb")


def main(folder: Path) -> None:
    os.environ.update(
        {
            "MLFLOW_TRACKING_URI": f"file:{folder / 'mlflow'}",
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "TRACKIO_DIR": str(folder / "trackio"),
            "WANDB_DIR": str(folder),
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
        }
    )
    import swanlab
    from hf_tools import train

    from channel_metrics import MetricsConfig
    from channel_metrics.trainers.hf import attach

    config = MetricsConfig(
        axes={"domain": {"bbu": "target", "rru": "target", "lvis": "aux"}},
        # In the first window, and in the last one.
        budget={"records": {"bbu": 1, "lvis": LAST}},
        alerts={"to": ["trackio", "wandb"], "file": str(folder / "alerts.jsonl")},
    )
    # transformers' callback asks for the current run, which SwanLab refuses while there is none.
    swanlab.init(mode="local", logdir=str(folder / "swanlab"), project="channels")
    trainer = train(
        folder / "out",
        prepare=lambda trainer: attach(trainer, config),
        records=None,
        report_to=list(TRACKERS),
        project="channels",
        max_steps=6,
    )
    swanlab.finish()
    (folder / "log_history.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
