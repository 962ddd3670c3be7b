"""The picture in the README: `python docs/plot_run.py runs/debug docs/demo.svg`.

Needs matplotlib, which `make env` happens to bring along.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "channel_metrics"

CHANNELS = {"bbu": "#2a78d6", "rru": "#1baf7a", "lvis": "#eda100", "lang_chat": "#e34948"}


def main(run: Path, picture: Path) -> None:
    """Draw loss and token accuracy of the train windows in `run`/trainer_state.json."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in history if "loss" in entry]
    steps = [entry["step"] for entry in logs]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, metric, title in zip(
        axes, ("loss", "token_acc"), ("loss (nats per token)", "token accuracy"), strict=True
    ):
        if metric == "loss":
            axis.plot(steps, [e["loss"] for e in logs], "k--", lw=1.2, label="all (the trainer's)")
        for name, color in CHANNELS.items():
            values = [entry.get(f"{name}_{metric}", float("nan")) for entry in logs]
            axis.plot(steps, values, color=color, lw=2, label=name)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
