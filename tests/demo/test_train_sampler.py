"""`channel-metrics train` with a sampler, and the benchmark of adaptive mixes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from benchmarks import adaptive
from channel_metrics.demo.config import ModelConfig, Source, TrainConfig, load_config
from channel_metrics.demo.tiny import TinyModel
from channel_metrics.demo.train import train
from channel_metrics.errors import ConfigError

TINY = ModelConfig(tiny=TinyModel(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8))


def small(path: Path) -> TrainConfig:
    config = load_config(path)
    steps = {"logging_steps": 2, "eval_steps": 4, "report_to": "none"}
    sources: tuple[Source, ...] = tuple(
        replace(source, max_bytes=40_000, val_samples=2) for source in config.sources
    )
    return replace(
        config, model=TINY, max_length=32, sources=sources, training=config.training | steps
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_weights_are_logged_and_followed(tmp_path: Path, workers: int) -> None:
    config = small(ROOT / "configs/adaptive_mix.yaml")
    config = replace(config, training=config.training | {"dataloader_num_workers": workers})
    found = train(config, output_dir=tmp_path, max_steps=8)
    windows = [log for log in found.log_history if "loss" in log]
    names = [source.name for source in config.sources]
    assert len(windows) == 4
    for log in windows:
        assert sum(log[f"{name}_weight"] for name in names) == pytest.approx(1)
        assert sum(log.get(f"{name}_samples", 0) for name in names) == 16
    assert windows[-1]["stdlib_weight"] != 0.25 or workers
    plan = json.loads((tmp_path / "channel_metrics_run.json").read_text())
    assert set(plan["records"]) == set(names) and min(plan["records"].values()) > 10


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ConfigError, match=r"metrics\.sampler works on one process"):
        train(small(ROOT / "configs/adaptive_mix.yaml"), output_dir=tmp_path, max_steps=2)


def test_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adaptive, "load_config", small)
    monkeypatch.setattr(adaptive, "_SEEDS", (1, 2))
    monkeypatch.setattr(adaptive, "_STARTS", {"equal": adaptive._STARTS["equal"]})
    adaptive.main(tmp_path, steps=4)
    first = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[1] for line in first[1:]] == ["fixed", "loss", "excess", "speed"]
    assert first[1].split(" | ")[3] == "" and "±" in first[2].split(" | ")[3]
    for rule in ("fixed", "loss", "excess"):
        found = json.loads((tmp_path / f"1-1-1-1_{rule}_1.json").read_text())
        assert (found["weights"]["stdlib"] == 0.25) == (rule == "fixed")

    def none(*args: Any, **options: Any) -> None:
        raise AssertionError("the runs of the folder are there")

    monkeypatch.setattr(adaptive, "train", none)
    adaptive.main(tmp_path, steps=4)
    assert [line for line in capsys.readouterr().out.splitlines() if line[:2] == "| "] == first
