"""The playbook's mixture in the Trainer, TRL and ms-swift: one file, and the same counts in each.

tests/megatron_lm/test_one_mixture.py trains on the same file in Megatron's loop.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from fork_client import Preload
from mixture_tools import FOLDER, SCRIPTS, check_counts, prepare
from paths import ROOT
from rank_cases import RanksOf, case
from swift_tools import SWIFT, needs_swift
from vision_tools import needs_vision

from channel_metrics import MetricsConfig

METRICS = "metrics: [loss, tokens, samples, share]\n"
VISION = Preload(("vision_tools:load_torchvision", *SWIFT.names))
Log = list[dict[str, Any]]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Log]:
    """The commands of the playbook for transformers and TRL, at the same time."""
    folder = tmp_path_factory.mktemp("one_mixture")
    with chdir(folder):
        prepare().main(vision=False)
    Path(folder, "metrics.yaml").write_text(METRICS)
    run = [sys.executable, "-m", "channel_metrics", "run", "--config", "metrics.yaml", "--patch"]
    started = {
        "hf": [*run, "hf_trainer", str(SCRIPTS / "hf_sft.py")],
        "trl": [*run, "trl", str(SCRIPTS / "trl_sft.py")],
    }
    environ = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    processes = {
        name: subprocess.Popen(
            command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for name, command in started.items()
    }
    for process in processes.values():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()[-4000:]
    return {name: last_state(folder / FOLDER / name) for name in started}


def last_state(folder: Path) -> Log:
    (path,) = folder.glob("checkpoint-*/trainer_state.json")
    history: Log = json.loads(path.read_text())["log_history"]
    return history


@pytest.mark.parametrize("trainer", ["hf", "trl"])
def test_text(logs: dict[str, Log], trainer: str) -> None:
    check_counts(logs[trainer], more_tokens=2)


def test_trl_and_transformers_agree(logs: dict[str, Log]) -> None:
    """The scripts give both the same tokens in the same order, so the losses are the same."""
    for theirs, ours in zip(logs["hf"], logs["trl"], strict=True):
        keys = [key for key in theirs if key.endswith(("_loss", "_tokens", "_share"))]
        assert {k: ours[k] for k in keys} == pytest.approx({k: theirs[k] for k in keys}, rel=1e-4)


@case(VISION, ranks=1)
def vision(folder: Path) -> Any:
    """`swift sft swift.yaml` with the plugin, on the vision-language model."""
    import channel_metrics.patches.ms_swift as patch
    from swift import sft_main
    from swift.cli import main as swift_cli

    command = [str(SCRIPTS / "swift.yaml"), "--use_cpu", "true"]
    patch.revert()
    swift_cli.parse_yaml_args(command)
    patch.apply(MetricsConfig(metrics=("loss", "tokens", "samples", "share")))
    folder.mkdir()
    try:
        with chdir(folder):
            prepare().main()
            sft_main(command)
    finally:
        patch.revert()
    lines = (folder / FOLDER / "swift/logging.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@needs_swift
@needs_vision
def test_vision_language_model(ranks_of: RanksOf) -> None:
    (log,) = ranks_of(vision)
    check_counts([entry for entry in log if "loss" in entry], more_tokens=2)


def test_the_playbook_shows_these_commands() -> None:
    page = (ROOT / "docs/TRAINING_PLAYBOOK.md").read_text(encoding="utf-8")
    for name in ("prepare.py", "hf_sft.py", "trl_sft.py", "swift.yaml"):
        assert f" configs/one_mixture/{name}" in page
