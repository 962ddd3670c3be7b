"""The alerts of a run in `analyze`, `report` and `watch`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from session_tools import batch, new
from typer.testing import CliRunner

from channel_metrics.analysis.alerts import alerts_of
from channel_metrics.analysis.readers.sources import find_sources
from channel_metrics.analysis.report.axes import marks_of
from channel_metrics.analysis.run import load_run
from channel_metrics.analysis.watch.follow import Follower
from channel_metrics.analysis.watch.screen import alert_line
from channel_metrics.cli.main import app
from channel_metrics.errors import ChannelMetricsError

LINE = "alert at step 2: nonfinite: 1 of 1 tokens of a window have no finite loss or weight"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    metrics = new(stream=str(tmp_path / "windows.jsonl"), alerts={"to": ["logger"]})
    for step in (1, 2, 3):
        metrics.count(batch(("a<b", 1, math.nan if step == 2 else 1.0), ("c", 1, 1.0)))
        metrics.close(step)
    return tmp_path


def output(*args: object) -> str:
    result = CliRunner().invoke(app, [*map(str, args)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_analyze_and_report_tell_of_alerts(run: Path) -> None:
    assert f"! a<b: {LINE}" in output("analyze", run)
    findings = json.loads(output("analyze", run, "--json"))["runs"][0]["findings"]
    assert [f["channel"] for f in findings if f["kind"] == "alert"] == ["a<b"]
    output("report", run)
    (page,) = run.rglob("*.html")
    text = page.read_text()
    assert LINE in text and "a&lt;b" in text and "a<b" not in text, "names are no markup"
    mark = {"kind": "alert", "step": 2, "text": "a<b nonfinite"}
    assert [m for m in marks_of(load_run(run)) if m["kind"] == "alert"] == [mark]


def test_watch_shows_the_last_alerts(run: Path) -> None:
    text = "alert at step 2: a<b: nonfinite: 1 of 1 tokens"
    assert text in output("watch", run, "--once")
    assert json.loads(output("watch", run, "--once", "--json"))["alerts"][0]["kind"] == "nonfinite"
    follower = Follower(run)
    follower.look()
    assert [alert_line(alert).startswith(text) for alert in follower.alerts] == [True]
    with (run / "alerts.jsonl").open("a") as file:
        file.write('{"alert": "starved", "channel": "", "split": "eval", "step": 9, "text": "t"}\n')
    with (run / "windows.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "train", "c_loss": 1.0}\n')
    follower.look()
    assert alert_line(follower.alerts[-1]) == "alert at step 9: the whole run in eval: starved: t"
    follower.close()


def test_lines_that_cannot_be_read_and_steps_that_are_done_again(tmp_path: Path) -> None:
    line = json.dumps({"alert": "share", "channel": "a", "split": "train", "step": 1, "text": "t"})
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "alerts.jsonl").write_text(f'{line}\nno json\n[]\n{line}\n{{"alert"')
    assert [alert.channel for alert in alerts_of(tmp_path)] == ["a"]
    assert alerts_of(tmp_path / "log.jsonl") == [], "only those beside it"


def test_a_file_of_alerts_is_no_log(tmp_path: Path) -> None:
    metrics = new(alerts={"to": [], "file": str(tmp_path / "alerts.jsonl")})
    metrics.count(batch((None, 1, 1.0)))
    metrics.close(1)
    with pytest.raises(ChannelMetricsError):
        find_sources(tmp_path)
