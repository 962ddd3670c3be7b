"""A tiny model, data and commands for runs of LLaMA-Factory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from paths import python_path
from swift_files import make_model

__all__ = ["NAMES", "Command", "make_files"]

STUBS = Path(__file__).parent / "stubs"
CLI = Path(sys.executable).with_name("llamafactory-cli")
NAMES = ("code", "chat")
OURS = ("-m", "channel_metrics", "run", "--patch", "llamafactory")


def make_files(folder: Path) -> Path:
    """A model, and datasets of all stages. Returns the folder."""
    make_model(folder / "model")
    rng = random.Random(0)
    info: dict[str, Any] = {}
    for name in NAMES:
        records = []
        for index in range(24):
            words = [" ".join(rng.choices(["see", "go", name], k=rng.randint(1, 6))) for _ in "abc"]
            turn = {"from": "human", "value": f"{words[0]} {index}"}
            records.append(
                {
                    "instruction": turn["value"],
                    "output": words[1],
                    "text": f"{words[0]} {words[1]}",
                    "source": rng.choice(["north", "south"]),
                    "conversations": [turn],
                    "chosen": {"from": "gpt", "value": words[1]},
                    "rejected": {"from": "gpt", "value": words[2]},
                    "turns": [turn, {"from": "gpt", "value": words[1]}],
                    "good": rng.random() < 0.5,
                }
            )
        # LLaMA-Factory drops this one, because nobody answers.
        records[3]["turns"] = records[3]["conversations"] = []
        path = folder / f"{name}.json"
        path.write_text(json.dumps(records))
        of_file = {"file_name": path.name}
        shared = {**of_file, "formatting": "sharegpt"}
        pair = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
        info[name] = {**shared, "columns": {"messages": "turns"}}
        info[f"{name}_text"] = {**of_file, "columns": {"prompt": "text"}}
        info[f"{name}_pairs"] = {**shared, "ranking": True, "columns": pair}
        info[f"{name}_kto"] = {**shared, "columns": {"messages": "turns", "kto_tag": "good"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


class Command:
    """A run of `llamafactory-cli train`, which begins at once.

    Args:
        files: what `make_files` made.
        folder: of the run; `log` and the weights are read from there.
        patch: whether to run it with channel metrics.
        ranks: of more than one are started by LLaMA-Factory itself.
        config: of the metrics, YAML.
        arguments: of LLaMA-Factory, beside those that all runs have.
    """

    def __init__(
        self,
        files: Path,
        folder: Path,
        *,
        patch: bool = True,
        ranks: int = 1,
        config: str = "",
        **arguments: Any,
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        given = {
            "model_name_or_path": str(files / "model"),
            "dataset_dir": str(files),
            "dataset": ",".join(NAMES),
            "output_dir": str(folder / "out"),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "template": "qwen",
            "cutoff_len": 64,
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
        ours = [*OURS, "--config", str(folder / "metrics.yaml")] if config else [*OURS]
        environ = {
            "PATH": os.pathsep.join([str(CLI.parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": python_path(STUBS),
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "NPROC_PER_NODE": str(ranks),
            **({"FORCE_TORCHRUN": "1"} if ranks > 1 else {}),
        }
        self.process = subprocess.Popen(
            [sys.executable, *(ours if patch else ()), str(CLI), "train", str(folder / "run.yaml")],
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
