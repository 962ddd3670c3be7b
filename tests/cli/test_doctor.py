"""`channel-metrics doctor`: what it prints, and that it imports no framework without need."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from typer.testing import CliRunner

from channel_metrics import __version__
from channel_metrics.alerting import Alerts
from channel_metrics.cli.main import app
from channel_metrics.startup.sitecustomize import PATCHES


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    records: list[dict[str, Any]] = [
        {"metadata": {"_fusion_source": "bbu"}, "dataset_id": "other"},
        {"metadata": {"_fusion_source": "bbu"}},
        {"channel": ["rru", "bbu"]},
        {"text": "none"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(autouse=True)
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch for a package that nobody has, so that no test waits for a trainer's import."""
    monkeypatch.setitem(PATCHES, "absent", {"no_such_package.trainer": "no_such_patch"})
    monkeypatch.delenv("CHANNEL_METRICS_CONFIG", raising=False)


def doctor(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *map(str, args)])
    return result.exit_code, result.output


def test_json_has_versions_config_and_the_fields_of_the_data(tmp_path: Path, data: Path) -> None:
    config = tmp_path / "metrics.yaml"
    config.write_text(
        "metrics: [loss]\neval_channels: [bbu]\nstop_at: {bbu_tokens: 2e9}\nalerts: {rate: 0.1}\n"
    )
    code, out = doctor("--patch", "absent", "--config", config, "--data", data, "--json")
    report = json.loads(out)
    versions = report["versions"]
    assert versions["channel_metrics"] == __version__
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["flash-attn"] is None
    assert report["config"]["from"] == str(config)
    assert report["config"]["values"]["metrics"] == ["loss"]
    assert report["config"]["values"]["key_format"] == "{channel}_{metric}", "the defaults, too"
    assert report["config"]["values"]["stop_at"] == {"bbu_tokens": 2e9}
    alerts = json.loads(json.dumps(asdict(Alerts(rate=0.1))))
    assert report["config"]["values"]["alerts"] == alerts
    assert report["config"]["values"]["budget"] == {}
    assert report["data"][str(data)] == {
        "records": 4,
        "fields": {"channel": 1, "metadata._fusion_source": 2},
        "channels": {"bbu": 3, "rru": 1},
    }
    assert report["patches"] == {"absent": "no_such_package is not installed"}
    assert code == 1, "the patch that was asked for does not apply"


def test_the_text_says_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = doctor("--patch", "absent", "--data", data)
    lines = out.splitlines()
    assert f"channel_metrics {__version__}" in lines
    assert "patch absent: does not apply: no_such_package is not installed" in lines
    assert "config: the defaults" in lines
    assert "  eval_channels: []" in lines
    at = lines.index(f"data: {data}")
    assert lines[at + 1 :] == [
        "  records: 4",
        "  channel from the field channel: 1 records",
        "  channel from the field metadata._fusion_source: 2 records",
        "  no channel: 1 records",
        "  channel bbu: 3",
        "  channel rru: 1",
    ]


def test_what_is_wrong_is_part_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.yaml").write_text("metric: [loss]\n")
    monkeypatch.setenv("CHANNEL_METRICS_CONFIG", str(tmp_path / "metrics.yaml"))
    code, out = doctor("--patch", "absent", "--data", tmp_path / "none.jsonl")
    assert code == 1
    assert "metrics.yaml (of CHANNEL_METRICS_CONFIG)\n  error: " in out
    assert "unknown key 'metric'" in out
    assert "does not exist" in out
    code, out = doctor("--patch", "hf")
    assert (code, "unknown patch 'hf'" in out) == (2, True)


def test_this_process_imports_no_torch_and_the_patch_is_tried_for_real(data: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'channel-metrics'\n"
        "from channel_metrics.cli.main import main\n"
        "try: main()\n"
        "finally: print('LOADED', {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--patch", "hf_trainer", "--data", str(data)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "patch hf_trainer: applies\n" in done.stdout
    assert done.stdout.endswith("LOADED set()\n")
