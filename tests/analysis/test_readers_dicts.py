"""Dictionaries that transformers prints, with its progress bar and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.analysis_tools import series_of
from channel_metrics.analysis.readers.dict_lines import DictLines
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.run import Run, load_run

TRAINING = """
import json, sys, torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (48, 12))]
args = TrainingArguments(
    sys.argv[1], per_device_train_batch_size=2, max_steps=14, logging_steps=3, eval_on_start=True,
    eval_strategy="steps", eval_steps=4, save_strategy="no", report_to=[], use_cpu=True,
)
sets = {"web": rows[:16], "code": rows[16:48]}
trainer = Trainer(model, args, train_dataset=rows, eval_dataset=sets)
trainer.train()
json.dump(trainer.state.log_history, open(sys.argv[1] + "/history.json", "w"))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `both.log`, what a training printed to both streams, and `out.log`."""
    folder = tmp_path_factory.mktemp("training")
    command = [sys.executable, "-c", TRAINING, str(folder)]
    with (folder / "both.log").open("w") as file:
        subprocess.run(
            command, check=True, stdout=file, stderr=subprocess.STDOUT, env=os.environ, timeout=120
        )
    lines = (folder / "both.log").read_text().replace("\r", "\n").splitlines()
    dicts = [line[line.index("{'") :] for line in lines if "{'" in line]
    (folder / "out.log").write_text("\n".join(dicts))
    return folder


def expected(folder: Path, key: str) -> dict[int, Any]:
    history = json.loads((folder / "history.json").read_text())
    # Four digits are printed.
    return {e["step"]: pytest.approx(e[key], rel=1e-3) for e in history if key in e}


def check_series(run: Run, folder: Path) -> None:
    assert series_of(run, GLOBAL, "loss") == expected(folder, "loss")
    assert series_of(run, GLOBAL, "grad_norm") == expected(folder, "grad_norm")
    for name in ("web", "code"):
        assert series_of(run, name, "loss", "eval") == expected(folder, f"eval_{name}_loss")
    assert run.channels("train") == []


def test_with_its_progress_bars_each_record_has_its_step(printed: Path) -> None:
    assert set(expected(printed, "loss")) == {3, 6, 9, 12}
    assert set(expected(printed, "eval_web_loss")) == {0, 4, 8, 12, 14}
    run = load_run(printed / "both.log")
    check_series(run, printed)
    assert not any("names no steps" in note for note in run.problems.notes)
    assert not run.problems.count


def test_without_a_progress_bar_the_records_are_counted_and_a_note_says_so(printed: Path) -> None:
    run = load_run(printed / "out.log")
    losses = [value for _, value in sorted(expected(printed, "loss").items())]
    assert list(series_of(run, GLOBAL, "loss").values()) == losses
    assert list(series_of(run, GLOBAL, "loss")) == [1, 2, 3, 4]
    assert list(series_of(run, "web", "loss", "eval")) == [0, 1, 2, 4, 5]
    assert run.problems.notes == ["the log names no steps: its records are numbered instead"]


def test_a_step_in_the_record_itself(tmp_path: Path) -> None:
    """As ms-swift prints it; older versions of transformers print numbers, not texts."""
    (tmp_path / "a.log").write_text(
        "[INFO:swift] args: {'lr': 1e-4}\n"
        "{'loss': 1.5, 'bbu_loss': 1.25, 'bbu_tokens': 8, 'global_step/max_steps': '5/93', "
        "'elapsed_time': '1m 2s'}\n"
        "{'loss': nan, 'bbu_loss': 1.0, 'bbu_tokens': 8, 'global_step/max_steps': '10/93'} "
        "{'eval_loss': 2.5, 'global_step/max_steps': '10/93'}\n"
    )
    run = load_run(tmp_path)
    assert series_of(run, "bbu", "loss") == {5: 1.25, 10: 1.0}
    assert series_of(run, GLOBAL, "loss") == pytest.approx({5: 1.5, 10: float("nan")}, nan_ok=True)
    assert series_of(run, GLOBAL, "loss", "eval") == {10: 2.5}


def test_the_output_that_wandb_keeps(tmp_path: Path) -> None:
    """`wandb/run-.../files/output.log`, here as PowerShell would redirect it."""
    path = tmp_path / "wandb" / "run-20261128_101010-abc" / "files" / "output.log"
    path.parent.mkdir(parents=True)
    path.write_text("start\n{'loss': 1.5, 'epoch': 0.5, 'step': 7}\n", encoding="utf-16")
    run = load_run(tmp_path)
    assert series_of(run, GLOBAL, "loss") == {7: 1.5}
    assert run.origin == f"{path}, text"


def test_records_do_not_wait_for_a_bar_forever() -> None:
    reader = DictLines()
    found = [reader.read("{'loss': '1.5', 'epoch': '0.1'}") or [] for _ in range(3000)]
    steps = [step for readings in found for step, key, _ in readings if key == "loss"]
    assert steps == list(range(1, 3001))
    assert reader.end() == []
