"""A tiny model, data and commands for runs of LLaMA-Factory."""

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
from mixture_runs import NAMES, WHOLE, Logged
from paths import python_path
from swift_files import make_model

__all__ = ["EPOCH", "ONLY_HERE", "Command", "make_files"]

ONLY_HERE = pytest.mark.skipif(
    find_spec("llamafactory") is None,
    reason="LLaMA-Factory has an environment of its own: `make test-llamafactory` runs this",
)
STUBS = Path(__file__).parent / "stubs"
CLI = Path(sys.executable).with_name("llamafactory-cli")
OURS = ("-m", "channel_metrics", "run", "--patch", "llamafactory")
# See WHOLE. All runs have `max_steps`, which comes first.
EPOCH = {**WHOLE, "max_steps": -1}


def make_files(folder: Path) -> Path:
    """Models with dropout and without, and datasets of all stages. Returns the folder."""
    make_model(folder / "dropout")
    make_model(folder / "model", attention_dropout=0.0)
    make_model(folder / "other", attention_dropout=0.0, seed=1)
    rng = random.Random(0)
    info: dict[str, Any] = {}
    for name in NAMES:
        path = folder / f"{name}.json"
        path.write_text(json.dumps([_record(name, index, rng) for index in range(24)]))
        of_file = {"file_name": path.name}
        shared = {**of_file, "formatting": "sharegpt"}
        pair = {"messages": "asked", "chosen": "chosen", "rejected": "rejected"}
        info[name] = {**shared, "columns": {"messages": "turns"}}
        info[f"{name}_text"] = {**of_file, "columns": {"prompt": "text"}}
        info[f"{name}_pairs"] = {**shared, "ranking": True, "columns": pair}
        info[f"{name}_kto"] = {**shared, "columns": {"messages": "answered", "kto_tag": "good"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def _record(name: str, index: int, rng: random.Random) -> dict[str, Any]:
    asked, *answers = (
        " ".join(rng.choices(["see", "go", name], k=rng.randint(1, 6))) for _ in "abc"
    )
    turn = {"from": "human", "value": f"{asked} {index}"}
    chosen, rejected = ({"from": "gpt", "value": answer} for answer in answers)
    return {
        # LLaMA-Factory drops a record that nobody answers.
        "turns": [] if index == 3 else [turn, chosen],
        "answered": [turn, chosen],
        "asked": [turn],
        "text": f"{asked} {answers[0]}",
        "chosen": chosen,
        "rejected": rejected,
        "good": index % 3 != 0,
        "source": rng.choice(["north", "south"]),
        # Of the answer, by a reference model; each third record has none.
        "ref_nll": None if index % 3 == 0 else 1.7 * index,
        "ref_tokens": None if index % 3 == 0 else len(answers[0]),
    }


class Command(Logged):
    """A run of `llamafactory-cli train`, which begins at once.

    Args:
        files: what `make_files` made.
        folder: of the run; it must not exist.
        model: the name of a model in `files`.
        patch: whether to run it with channel metrics.
        ranks: more than one are started by LLaMA-Factory itself.
        cache: the folder of preprocessed data; None makes one of its own.
        config: of the metrics, YAML.
        arguments: of LLaMA-Factory, beside those that all runs have.
    """

    def __init__(
        self,
        files: Path,
        folder: Path,
        *,
        model: str = "model",
        patch: bool = True,
        ranks: int = 1,
        cache: Path | None = None,
        config: str = "metrics: [loss, tokens, samples]",
        **arguments: Any,
    ) -> None:
        folder.mkdir(parents=True)
        super().__init__(folder)
        self.output = ""
        given = {
            "model_name_or_path": str(files / model),
            "dataset_dir": str(files),
            "dataset": ",".join(NAMES),
            "output_dir": str(folder / "out"),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "template": "empty",
            "cutoff_len": 96,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "overwrite_cache": True,
        }
        if ranks > 1:
            given["ddp_backend"] = "gloo"
        (folder / "run.yaml").write_text(json.dumps(given | arguments))
        (folder / "metrics.yaml").write_text(f"{config}\n")
        ours = [*OURS, "--config", str(folder / "metrics.yaml")] if patch else []
        environ = {
            "PATH": os.pathsep.join([str(CLI.parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": python_path(STUBS),
            "HF_DATASETS_CACHE": str(cache or folder / "cache"),
            "NPROC_PER_NODE": str(ranks),
            **({"FORCE_TORCHRUN": "1"} if ranks > 1 else {}),
        }
        self.process = subprocess.Popen(
            [sys.executable, *ours, str(CLI), "train", str(folder / "run.yaml")],
            env=os.environ | environ,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> Command:
        """Wait for its end."""
        self.output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, self.output[-6000:]
        return self

    @property
    def log(self) -> list[dict[str, Any]]:
        """What the trainer logged."""
        state = json.loads((self.folder / "out" / "trainer_state.json").read_text())
        found: list[dict[str, Any]] = state["log_history"]
        return found
