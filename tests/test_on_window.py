"""Functions that the config names by import path."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from session_tools import batch

from channel_metrics import ChannelMetrics, ConfigError, MetricsConfig, Window

SEEN: list[int] = []


class Shows:
    is_display = True
    calls = 0

    def __call__(self, window: object) -> None:
        self.calls += 1
        raise KeyError("show")


shows = Shows()


class Tells:
    is_display = True

    def __call__(self, window: Window) -> str:
        return f"shown at {window.step}"


def keep(window: Window) -> None:
    SEEN.append(window.step)


def test_a_function_gets_each_closed_window() -> None:
    SEEN.clear()
    paths = ("test_on_window:keep", "test_on_window:shows")
    metrics = ChannelMetrics(MetricsConfig(on_window=paths))
    for step in (3, 4):
        metrics.count(batch(("a", 1, 1.0)))
        metrics.close(step)
    own = sys.modules["test_on_window"]
    assert own.SEEN == [3, 4] and own.shows.calls == 1


def test_what_a_display_returns_ends_nothing() -> None:
    """It may be on one rank only, and the others would wait."""
    metrics = ChannelMetrics(MetricsConfig())
    metrics.on_window.append(Tells())
    metrics.count(batch(("a", 1, 1.0)))
    metrics.close(1)
    assert not metrics.stop_reason


def test_the_hook_of_the_page_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = (ROOT / "docs/acting.md").read_text().split("```python\n")[1:]
    (hook,) = [block.split("```")[0] for block in blocks if "def hook" in block]
    (tmp_path / "module_of_the_page.py").write_text(hook)
    monkeypatch.syspath_prepend(tmp_path)
    metrics = ChannelMetrics(MetricsConfig(on_window=("module_of_the_page:hook",)))
    for step, (name, loss) in enumerate([("bbu", 2.5), ("a", 1.0), ("bbu", 1.5)], start=1):
        assert not metrics.stop_reason
        metrics.count(batch((name, 1, loss)))
        metrics.close(step)
    assert metrics.stop_reason == "the loss of bbu is below 2"
    assert "the loss of bbu is below 2: this trainer goes on; end it yourself." in caplog.text


def test_nothing_in_a_window_can_be_changed() -> None:
    metrics = ChannelMetrics(MetricsConfig(metrics=("loss",), axes={"kind": {"a": "x"}}))
    metrics.count(batch(("a", 2, 1.0)))
    window = metrics.close(1)
    assert window.totals["a"] == {"tokens_total": 2, "samples_total": 1}
    kind = window.axes["kind"]["x"]
    mappings: tuple[Any, ...] = (window.values["a"], window.values, window.axes, kind)
    for mapping in (*mappings, window.logs):
        with pytest.raises(TypeError, match="cannot be changed; copy"):
            mapping.update(b=1)
        with pytest.raises(TypeError, match="cannot be changed"):
            mapping["b"] = {}
        with pytest.raises(TypeError, match="cannot be changed"):
            mapping |= {}
    with pytest.raises(TypeError, match="cannot be changed"):
        window.totals["a"]["tokens_total"] = 0
    with pytest.raises(FrozenInstanceError):
        window.step = 2  # type: ignore[misc]  # frozen, which is the point
    assert isinstance(window.table, tuple) and {*map(type, window.table)} == {tuple}
    again = pickle.loads(pickle.dumps(window))
    assert again == window and json.loads(json.dumps(window.logs)) == window.logs
    with pytest.raises(TypeError, match="cannot be changed"):
        again.logs.clear()


def test_tokens_so_far_in_each_window() -> None:
    metrics = ChannelMetrics(MetricsConfig())
    for step in (1, 2):
        metrics.count(batch(("a", 3, 1.0)))
        assert metrics.close(step).totals["a"]["tokens_total"] == 3 * step
    with metrics.evaluation("eval", 2) as found:
        metrics.count(batch(("a", 9, 1.0)))
    assert found.window is not None and found.window.totals["a"]["tokens_total"] == 6


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("keep", "must be `module:function`, but is 'keep'"),
        ("no_such_module:keep", "cannot be imported .No module named 'no_such_module'"),
        ("test_on_window:no", "cannot be imported .module 'test_on_window' has no attribute 'no'"),
        ("test_on_window:SEEN", "which is no function"),
    ],
)
def test_a_path_that_leads_nowhere(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ChannelMetrics(MetricsConfig(on_window=(path,)))


def test_on_window_must_be_a_list() -> None:
    with pytest.raises(ConfigError, match="on_window must be a list of strings"):
        MetricsConfig.from_mapping({"on_window": "my_module:show"})


def test_a_module_beside_a_patched_script(tmp_path: Path) -> None:
    text = (ROOT / "docs/stream.md").read_text()
    (tmp_path / "my_module.py").write_text(text.split("```python\n")[2].split("```")[0])
    (tmp_path / "metrics.yaml").write_text('on_window: ["my_module:show"]\n')
    (tmp_path / "train.py").write_text(_SCRIPT)
    command = [sys.executable, "-m", "channel_metrics", "run", "--patch", "hf_trainer"]
    command += ["--config", "metrics.yaml", "train.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if "{'a': " in line and "loss" not in line]
    assert [line.split()[0] for line in lines] == ["1", "2"]


_SCRIPT = """
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
def pad(records):
    ids = torch.tensor([record["input_ids"] for record in records])
    return {"input_ids": ids, "labels": ids}
data = Dataset.from_list([{"input_ids": [1, 2, 3], "channel": "a"}] * 4)
args = TrainingArguments("out", max_steps=2, logging_steps=1, report_to=[], use_cpu=True,
    per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True)
Trainer(model, args, train_dataset=data, data_collator=pad).train()
"""
