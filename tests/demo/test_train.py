"""A short run, in this process."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from channel_metrics.config import MetricsConfig
from channel_metrics.demo.config import ModelConfig, ProbeSection, TrainConfig, load_config
from channel_metrics.demo.tiny import TinyModel
from channel_metrics.demo.train import train
from channel_metrics.errors import ChannelMetricsError, ConfigError

DEBUG = Path(__file__).parents[2] / "configs" / "fused_data" / "debug.yaml"
CHANNELS = ["bbu", "rru", "lvis", "lang_chat"]


def small(**training: Any) -> TrainConfig:
    config = load_config(DEBUG)
    size = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
    steps = {"max_steps": 6, "logging_steps": 2, "eval_steps": 4, "report_to": "none"}
    return replace(
        config,
        model=ModelConfig(tiny=size),
        max_length=192,
        training=config.training | steps | training,
    )


def test_a_run_logs_every_channel_and_sums_it_up(tmp_path: Path) -> None:
    summary = train(small(), output_dir=tmp_path)
    keys = {key for log in summary.log_history for key in log}
    for name in CHANNELS:
        assert {f"{name}_loss", f"{name}_token_acc", f"{name}_tokens"} <= keys
        assert f"eval_{name}_loss" in keys
    assert [row.channel for row in summary.rows] == CHANNELS
    for row in summary.rows:
        assert row.first_loss is not None
        assert row.last_loss is not None
        assert row.eval_loss is not None
        assert all(math.isfinite(x) for x in (row.first_loss, row.last_loss, row.eval_loss))
    assert sum(row.share or 0 for row in summary.rows) == pytest.approx(1)
    assert summary.log_history[-1]["step"] == 6
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["log_history"] == summary.log_history


def test_a_terminal_gets_one_line_per_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(small(), output_dir=tmp_path, quiet=False)
    lines = [part.strip() for part in capsys.readouterr().out.splitlines()]
    shown = [line for line in lines if line.startswith("step ")]
    logged = [log for log in summary.log_history if {"loss", "eval_loss"} & set(log)]
    assert len(shown) == len(logged) == 5
    assert not any("{" in line for line in lines)
    for line, log in zip(shown, logged, strict=True):
        prefix, title = ("eval_", "eval loss") if "eval_loss" in log else ("", "loss")
        keys = {title: f"{prefix}loss"} | {name: f"{prefix}{name}_loss" for name in CHANNELS}
        parts = [f"{name} {log[key]:.4f}" for name, key in keys.items() if key in log]
        assert line == "  ".join([f"step {log['step']}", *parts])


def test_the_final_weights_are_evaluated_once(tmp_path: Path) -> None:
    logs = train(small(eval_steps=2), output_dir=tmp_path, max_steps=4).log_history
    assert [log["step"] for log in logs if "eval_loss" in log] == [2, 4]


def test_the_same_config_gives_the_same_losses(tmp_path: Path) -> None:
    one, two = (train(small(), output_dir=tmp_path / name, max_steps=2) for name in "ab")
    assert one.rows == two.rows


def test_channels_of_another_field(tmp_path: Path) -> None:
    config = replace(small(), metrics=MetricsConfig(fields=("metadata._fusion_domain",)))
    rows = train(config, output_dir=tmp_path, max_steps=2).rows
    assert [row.channel for row in rows] == ["source", "target"]


def test_tensorboard_and_checkpoint_in_the_run_folder(tmp_path: Path) -> None:
    train(
        small(report_to="tensorboard", save_strategy="steps", save_steps=2),
        output_dir=tmp_path,
        max_steps=2,
    )
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"eval_strategy": "sometimes"}}, "transformers refuses"),
        ({"metrics": MetricsConfig(fields=("channel",))}, "a field in metadata"),
    ],
)
def test_configs_that_cannot_run(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(replace(small(), **changes), output_dir=tmp_path)


def test_evaluation_without_records(tmp_path: Path) -> None:
    config = small()
    sources = tuple(replace(source, val_path=None) for source in config.sources)
    with pytest.raises(ConfigError, match="val_path or val_samples"):
        train(replace(config, sources=sources), output_dir=tmp_path)


def test_evaluation_logs_target_channels_and_those_with_a_val_split(tmp_path: Path) -> None:
    """bbu and rru are target sources; lang_chat brings a val_path, lvis only held-out records."""
    config = small(eval_steps=2)
    sources = [
        replace(s, val_path=None, val_samples=4) if s.name == "lvis" else s for s in config.sources
    ]
    config = replace(config, sources=tuple(sources), eval_domain="target")
    logs = train(config, output_dir=tmp_path, max_steps=2).log_history
    keys = {key for log in logs for key in log}
    assert {"lvis_loss", "eval_bbu_loss", "eval_rru_loss", "eval_lang_chat_loss"} <= keys
    assert not any(key.startswith("eval_lvis") for key in keys)


def test_target_channels_must_exist_and_be_said_once(tmp_path: Path) -> None:
    config = small()
    sources = tuple(replace(s, domain="source", val_path=None) for s in config.sources)
    with pytest.raises(ConfigError, match="evaluation would log nothing"):
        replace(config, sources=sources, eval_domain="target").metrics_of_run()
    metrics = MetricsConfig(eval_channels=("bbu",))
    with pytest.raises(ConfigError, match="set one of them"):
        replace(config, metrics=metrics, eval_domain="target")


def test_a_probe_beside_the_training(tmp_path: Path) -> None:
    path = tmp_path / "canary.jsonl"
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    records = [{"messages": chat}, {"text": "the quick brown fox"}, {"text": "jumps over"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    probe = ProbeSection(every=4, max_overhead=None, sources={"canary": path})
    without = train(small(), output_dir=tmp_path / "without")
    probed = train(replace(small(), probe=probe), output_dir=tmp_path / "probed")
    assert probed.rows == without.rows
    logs = [log for log in probed.log_history if "dataset_canary_loss" in log]
    assert [log["step"] for log in logs] == [0, 4, 6]
    for log in logs:
        assert log["dataset_canary_loss_low"] < log["dataset_canary_loss"]
        assert log["dataset_canary_loss"] < log["dataset_canary_loss_high"]
    assert logs[-1]["dataset_canary_loss"] < logs[0]["dataset_canary_loss"]


def test_a_probe_of_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "canary.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    probe = ProbeSection(sources={"canary": path})
    with pytest.raises(ChannelMetricsError, match=r"canary.jsonl:2: expected a record"):
        train(replace(small(), probe=probe), output_dir=tmp_path / "run")
