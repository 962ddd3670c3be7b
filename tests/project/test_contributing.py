"""The worked diffs of CONTRIBUTING.md: each applies to the code of today, and works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

METRIC = """
import torch
from channel_metrics import ChannelLossAccumulator
acc = ChannelLossAccumulator(["bbu"], metrics=["loss", "easy_share"])
cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
acc.update(torch.tensor([0.5, 3.0, 0.75, 7.0]), channels=["bbu"], cu_seqlens=cu_seqlens)
assert acc.compute() == {"bbu_loss": 2.8125, "bbu_easy_share": 0.5}, acc.compute()
"""

READER = """
from pathlib import Path
from channel_metrics.analysis.run import load_run
Path("run.steps").write_text("step=3 bbu_loss=1.5\\nstep=3 bbu_tokens=7\\nwhat?\\n")
for place in (Path("run.steps"), Path()):
    run = load_run(place)
    assert run.problems.count == 1, run.problems
    steps, values = run.series("bbu", "loss")
    assert (steps.tolist(), values.tolist()) == ([3], [1.5])
"""

TRAINER = """
import json
from pathlib import Path
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from channel_metrics import MetricsConfig
from channel_metrics.trainers.mytrainer import ChannelMetricsCallback
torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, use_cache=False))
callback = ChannelMetricsCallback(MetricsConfig(metrics=("loss", "tokens")))
def pad(records):
    ids = torch.tensor([record["ids"] for record in records])
    return {"input_ids": ids, "labels": ids}
batch = callback.metrics.collator(pad)([{"ids": [1, 2, 3], "channel": "bbu"}] * 2)
loss = callback.around_step(lambda model, batch: model(**batch).loss, model, batch)
logs = {"loss": float(loss)}
callback.before_log(1, logs)
assert logs["bbu_tokens"] == 4 and abs(logs["bbu_loss"] - logs["loss"]) < 1e-6, logs
callback.at_checkpoint(Path(), is_main_process=True)
totals = json.loads(Path("channel_metrics.json").read_text())["channels"]
assert totals == {"bbu": {"tokens_total": 4, "samples_total": 2}}, totals
"""


def diffs() -> list[str]:
    """The diffs of the page: a metric, a reader, a trainer."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("number", "use"),
    [(0, METRIC), (1, READER), (2, TRAINER)],
    ids=["metric", "reader", "trainer"],
)
def test_diff(number: int, use: str, tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "channel_metrics", tmp_path / "channel_metrics", ignore=ignore)
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    commands = (["git", "apply", "-"], [sys.executable, "-c", use])
    for command in commands:
        given = diffs()[number] if command[0] == "git" else None
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environ,
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_every_diff_is_used() -> None:
    assert len(diffs()) == 3
