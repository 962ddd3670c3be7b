"""A tiny model, data and runs of Axolotl: forked ones, and the command itself."""

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
from fork_client import Preload
from mixture_runs import NAMES, Logged
from paths import python_path
from swift_files import make_model

__all__ = [
    "AXOLOTL",
    "ONLY_HERE",
    "PLUGIN",
    "SIZE",
    "Command",
    "Run",
    "entries",
    "make_files",
    "train",
    "warm",
    "write_config",
]

ONLY_HERE = pytest.mark.skipif(
    find_spec("axolotl") is None,
    reason="Axolotl has an environment of its own: `make test-axolotl` runs this",
)
PLUGIN = "channel_metrics.trainers.axolotl.ChannelMetricsPlugin"
# The longest row.
SIZE = 128
ENVIRON = {"AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true"}
AXOLOTL = Preload(
    ("axolotl.cli.train", "axolotl.train", "axolotl.core.builders.causal", "axolotl_tools:warm"),
    environ=tuple(ENVIRON.items()),
)


def warm() -> None:
    """Compile Axolotl's packing once, and not in every run."""
    from axolotl.utils.samplers.multipack import MultipackBatchSampler, allocate_sequentially
    from numpy import array
    from torch.utils.data import SequentialSampler

    lengths = array([3, 4, 5])
    allocate_sequentially(lengths, rank=0, bin_capacity=8, num_ranks=1)
    sampler = SequentialSampler(lengths)
    list(MultipackBatchSampler(sampler, 1, 8, lengths, bin_size=200, num_processes=1))


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


def entries(files: Path, kind: str = "input_output") -> list[dict[str, Any]]:
    """What stands under `datasets:`."""
    return [{"path": str(files / f"{name}.jsonl"), "type": kind} for name in NAMES]


def write_config(
    files: Path, folder: Path, *, model: str = "model", plugin: bool = True, **settings: Any
) -> Path:
    """Write the YAML file of a run.

    Args:
        files: what `make_files` made.
        folder: of the run.
        model: the name of a model in `files`.
        plugin: whether to run it with channel metrics.
        settings: of Axolotl, beside those that all runs have.
    """
    given = {
        "base_model": str(files / model),
        "plugins": [*([PLUGIN] if plugin else []), "axolotl_log.LogPlugin"],
        "datasets": entries(files),
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": SIZE,
        "attn_implementation": "sdpa",
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
        "dataset_num_proc": 1,
        "bf16": False,
        "tf32": False,
        **({"channel_metrics": {"metrics": ["loss", "tokens", "samples"]}} if plugin else {}),
        **({} if "num_train_epochs" in settings else {"max_steps": 4}),
    }
    if "num_train_epochs" in settings:
        settings["num_epochs"] = settings.pop("num_train_epochs")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(json.dumps(given | settings))
    return path


class Run(Logged):
    """A run that has ended."""

    folder: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        """What the trainer logged."""
        found: list[dict[str, Any]] = json.loads((self.folder / "log.json").read_text())
        return found

    @property
    def seen(self) -> set[tuple[int, ...]]:
        """With packing: the sequences that the model was trained on. Axolotl leaves some out."""
        return self._sequences("seen")

    @property
    def evaluated(self) -> set[tuple[int, ...]]:
        """The same for evaluations."""
        return self._sequences("evaluated")

    def _sequences(self, name: str) -> set[tuple[int, ...]]:
        lists = (json.loads(path.read_text()) for path in self.folder.glob(f"{name}*.json"))
        return {tuple(ids) for of_rank in lists for ids in of_rank}

    @property
    def output(self) -> str:
        """What was printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("rank*.*")))


def train(config: str) -> None:
    """In a forked process: what `axolotl train --launcher python` does."""
    from axolotl.cli.train import do_cli

    do_cli(config=config)


class Command(Run):
    """A run of `axolotl train`, which begins at once. launch: arguments after the config."""

    def __init__(self, files: Path, folder: Path, *launch: str, **settings: Any) -> None:
        super().__init__(folder)
        config = write_config(files, folder, **settings)
        cli = Path(sys.executable).with_name("axolotl")
        environ = {
            "PATH": os.pathsep.join([str(cli.parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": python_path(),
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }
        with (folder / "rank.out").open("w") as output:
            self.process = subprocess.Popen(
                [str(cli), "train", str(config), *launch],
                env=os.environ | ENVIRON | environ,
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def end(self, code: int = 0) -> Command:
        """Wait for its end."""
        assert self.process.wait(timeout=600) == code, self.output[-6000:]
        return self
