"""A tiny model, data and commands for runs of Axolotl."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from paths import python_path
from swift_files import make_model

__all__ = ["NAMES", "ONLY_HERE", "SIZE", "Command", "make_files"]

ONLY_HERE = pytest.mark.skipif(
    find_spec("axolotl") is None,
    reason="Axolotl has an environment of its own: `make test-axolotl` runs this",
)
CLI = Path(sys.executable).with_name("axolotl")
PLUGIN = "channel_metrics.trainers.axolotl.ChannelMetricsPlugin"
NAMES = ("code", "chat")
# The longest row.
SIZE = 128
# A learning rate of 0, no dropout, all records once, one log: the sums of a whole dataset.
WHOLE = {"learning_rate": 0.0, "num_epochs": 1, "logging_steps": 1000}


def make_files(folder: Path) -> Path:
    """Models with dropout and without, and datasets. Returns the folder."""
    make_model(folder / "dropout")
    make_model(folder / "model", attention_dropout=0.0)
    rng = random.Random(0)
    for name in NAMES:
        records = [_record(name, index, rng) for index in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def _record(name: str, index: int, rng: random.Random) -> dict[str, Any]:
    asked, said = (" ".join(rng.choices(["see", "go", name], k=rng.randint(1, 6))) for _ in "ab")
    segments = [{"label": False, "text": f"{asked} {index}"}, {"label": True, "text": said}]
    return {
        # Some texts give several rows, and one gives none.
        "text": "" if index == 3 else " ".join([asked] * rng.randint(1, 6)),
        "segments": segments,
        "source": rng.choice(["north", "south"]),
    }


class Command:
    """A run of `axolotl train`, which begins at once.

    Args:
        files: what `make_files` made.
        folder: of the run; it must not exist.
        model: the name of a model in `files`.
        plugin: whether to run it with channel metrics.
        launch: arguments of `axolotl train` after the config.
        prepared: the folder of the prepared data; by default one of its own.
        settings: of Axolotl, beside those that all runs have.
    """

    def __init__(
        self,
        files: Path,
        folder: Path,
        *,
        model: str = "model",
        plugin: bool = True,
        launch: tuple[str, ...] = ("--launcher", "python"),
        prepared: Path | None = None,
        **settings: Any,
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.output = folder, ""
        entries = [{"path": str(files / f"{name}.jsonl"), "type": "input_output"} for name in NAMES]
        given = {
            "base_model": str(files / model),
            "plugins": [*([PLUGIN] if plugin else []), "axolotl_log.LogPlugin"],
            "datasets": entries,
            "dataset_prepared_path": str(prepared or folder / "prepared"),
            "output_dir": str(folder / "out"),
            "sequence_len": SIZE,
            "attn_implementation": "sdpa",
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "learning_rate": 0.01,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "val_set_size": 0,
            "dataset_num_proc": 1,
            "bf16": False,
            "tf32": False,
        }
        if plugin:
            given["channel_metrics"] = {"metrics": ["loss", "tokens", "samples"]}
        if settings.get("num_epochs"):
            given.pop("max_steps")
        (folder / "run.yaml").write_text(json.dumps(given | settings))
        environ = {
            "PATH": os.pathsep.join([str(CLI.parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": python_path(),
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "AXOLOTL_DO_NOT_TRACK": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        self.process = subprocess.Popen(
            [str(CLI), "train", str(folder / "run.yaml"), *launch],
            env=os.environ | environ,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, *, fails: bool = False) -> Command:
        """Wait for its end."""
        self.output, _ = self.process.communicate(timeout=300)
        assert bool(self.process.returncode) == fails, self.output[-6000:]
        return self

    @property
    def log(self) -> list[dict[str, Any]]:
        """What the trainer logged."""
        found: list[dict[str, Any]] = json.loads((self.folder / "log.json").read_text())
        return found

    @property
    def values(self) -> dict[str, Any]:
        """All that was logged in training, by key."""
        trained = [e for e in self.log if not any(key.startswith("eval_") for key in e)]
        return {key: value for entry in trained for key, value in entry.items()}

    @property
    def weights(self) -> bytes:
        """The trained weights."""
        (path,) = (self.folder / "out").glob("*model.safetensors")
        return path.read_bytes()
