"""Alerts: what they tell, how often, and that they survive a resume."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from session_tools import batch, new

from benchmarks.alarm_runs import false_alerts
from channel_metrics import ConfigError, MetricsConfig
from channel_metrics.alerting import KINDS
from channel_metrics.core.schema import Column, Schema
from channel_metrics.observers.alerts import rates
from channel_metrics.session import ChannelMetrics

TOLD: list[Any] = []


def keep(alert: Any) -> None:
    TOLD.append(alert)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "alert at" in record.getMessage()]
    caplog.clear()
    return found


def run(metrics: ChannelMetrics, *windows: Sequence[tuple[str | None, int, float]]) -> None:
    for step, counts in enumerate(windows, start=1):
        metrics.count(batch(*counts))
        metrics.close(step)


def watching(**alerts: Any) -> ChannelMetrics:
    return new(alerts={"cooldown": 0, **alerts})


def forgetting(metrics: ChannelMetrics, steps: range, rises_at: int = 40) -> None:
    for step in steps:
        noise = random.Random(step).gauss
        a = 2 + noise(0, 0.01) + (0.3 if step > rises_at else 0)
        metrics.count(batch(("a", 2, a), ("b", 2, 4 - 0.02 * step + noise(0, 0.01))))
        metrics.close(step)


def test_a_channel_that_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    forgetting(watching(), range(1, 81))
    (line,) = told(caplog)
    assert line.startswith("alert at step 42: a: forgetting: the loss rose from 1.99")
    assert "while that of the other channels fell by 0.1" in line


def test_if_all_losses_rise_none_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    metrics = watching()
    for step in range(1, 81):
        loss = 2 + random.Random(step).gauss(0, 0.01) + (0.3 if step > 40 else 0)
        metrics.count(batch(("a", 2, loss), ("b", 2, loss)))
        metrics.close(step)
    assert told(caplog) == []


@pytest.mark.parametrize("kinds", [["overfitting"], []])
def test_overfitting(kinds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    metrics = watching(kinds=kinds)
    for step in range(1, 121):
        noise = random.Random(step).gauss
        metrics.count(batch(("a", 2, 4 - 0.02 * step + noise(0, 0.01))))
        metrics.close(step)
        if step % 5 == 0:
            loss = 3 - 0.01 * min(step, 80) + (0.5 if step > 90 else 0) + noise(0, 0.002)
            with metrics.evaluation("eval", step):
                metrics.count(batch(("a", 2, loss), ("c", 2, 2.0 + noise(0, 0.002))))
    lines = told(caplog)
    assert {line.split(":")[1] for line in lines} == {" a in eval", " the whole run in eval"}
    assert all("overfitting: the loss rose" in line for line in lines), lines
    assert all("while that of training fell by" in line for line in lines)


def test_a_resumed_run_knows_the_past(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = watching()
    forgetting(first, range(1, 41))
    first.save(tmp_path, is_writer=True)
    second = watching()
    second.start(tmp_path)
    forgetting(second, range(41, 81))
    (line,) = told(caplog)
    assert line.startswith("alert at step 42: a: forgetting")


def test_tokens_without_a_finite_loss(caplog: pytest.LogCaptureFixture) -> None:
    nan, good = [("a", 2, math.nan), ("b", 1, 1.0)], [("a", 2, 1.0)]
    run(watching(), nan, nan, [("b", 1, 1.0)], good, nan)
    assert told(caplog) == [
        f"alert at step {step}: a: nonfinite: 2 of 2 tokens of a window have no finite loss or "
        "weight"
        for step in (1, 5)
    ]
    run(watching(cooldown=5), nan, good, nan, good, nan, nan, nan)
    assert [line[:15] for line in told(caplog)] == ["alert at step 1", "alert at step 6"]


def test_each_split_has_alerts_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    metrics = watching(cooldown=5)
    run(metrics, [("a", 2, math.nan)])
    with metrics.evaluation("eval", 1):
        metrics.count(batch(("a", 2, math.nan)))
    assert [line.split(": ")[1] for line in told(caplog)] == ["a", "a in eval"]


def test_the_whole_is_a_test_of_overfitting_only() -> None:
    for kinds, tests in ((["forgetting"], {"a"}), (["forgetting", "overfitting"], {"a", ""})):
        metrics = watching(kinds=kinds)
        with metrics.evaluation("eval", 1):
            metrics.count(batch(("a", 2, 1.0)))
        assert set(metrics.totals.notes["alerts"]["losses"]["tests"]["eval"]) == tests


def test_a_channel_that_is_absent_for_long(caplog: pytest.LogCaptureFixture) -> None:
    both, one = [("a", 1, 1.0), ("b", 1, 1.0)], [("b", 1, 1.0)]
    run(watching(kinds=["starved"]), *[both] * 30, *[one] * 10, both, *[one] * 10)
    assert told(caplog) == [
        "alert at step 32: a: starved: no token in 2 windows; it was in 30 of 30 before",
        "alert at step 47: a: starved: no token in 6 windows; it was in 31 of 41 before",
    ]
    rhythm = [one, one, one, one, both]
    run(watching(kinds=["starved"]), *rhythm * 20)
    assert told(caplog) == [], "each fifth window is its rhythm"


def test_a_share_off_its_target(caplog: pytest.LogCaptureFixture) -> None:
    budget = {"ratios": {"a": 3, "b": 1}}
    metrics = new(alerts={"share": 0.05, "kinds": ["share"]}, budget=budget)
    run(metrics, *[[("a", 1, 1.0)] * 3 + [("b", 1, 1.0)]] * 200, *[[("b", 1, 1.0)] * 4] * 40)
    lines = told(caplog)
    assert [line.split(": its")[0] for line in lines] == [
        "alert at step 217: a: share",
        "alert at step 217: b: share",
    ]
    assert "share of the samples is 69.1%, and should be 75.0%" in lines[0]


def test_the_rate_is_divided_among_what_is_watched() -> None:
    assert rates(0.04, KINDS) == (0.02, 0.01)
    assert rates(0.03, {"forgetting", "starved", "nonfinite"}) == (0.02, 0.01)
    assert rates(0.05, {"share"})[1] == 0.05 and rates(0.05, {"overfitting"})[0] == 0.05


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_at_most_the_stated_rate_of_runs_has_a_false_alert(unit: str) -> None:
    """Shorter than benchmarks/alarms.py: 200 runs of 4 channels and 40 windows."""
    assert sum(bool(false_alerts(run, 4, 40, unit)) for run in range(200)) <= 10


def test_unlabeled_above_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    windows: list[list[tuple[str | None, int, float]]] = [
        [("a", 100, 1.0), (None, n, 1.0)] for n in (4, 6, 4, 6, 1, 6)
    ]
    run(watching(unlabeled=0.05), *windows)
    assert [line[:23] for line in told(caplog)] == [
        "alert at step 2: unlabe",
        "alert at step 6: unlabe",
    ], "it must fall to half of the limit before the next one"


def test_an_exhausted_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {
        "alerts": {"kinds": ["exhausted"], "epochs": 2, "cooldown": 0},
        "budget": {"records": {"a": 3}},
    }
    metrics = new(**settings)
    run(metrics, *[[("a", 1, 1.0), ("a", 1, 1.0)]] * 3)
    (line,) = told(caplog)
    assert line.endswith("exhausted: 6 samples were trained on, of a source of 3 records")
    metrics.save(tmp_path, is_writer=True)
    again = new(**settings)
    again.start(tmp_path)
    run(again, [("a", 1, 1.0)])
    assert told(caplog) == []


def test_the_file_of_alerts(tmp_path: Path) -> None:
    metrics = new(alerts={"to": []}, stream=str(tmp_path / "windows.jsonl"))
    run(metrics, [(None, 1, 1.0), ("a", 1, 1.0)])
    (line,) = (tmp_path / "alerts.jsonl").read_text().splitlines()
    schema = json.loads((ROOT / "docs/alerts.schema.json").read_text())
    assert set(json.loads(line)) == set(schema["required"]) == set(schema["properties"])
    assert set(schema["properties"]["alert"]["enum"]) == set(KINDS)
    assert json.loads(line) == {
        "channel_metrics": 1, "alert": "unlabeled", "channel": "unlabeled", "split": "train",
        "step": 1, "text": "50.0% of the tokens of a window have no channel",
    }  # fmt: skip


def test_without_a_file_a_warning_says_so_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "a.jsonl")
    for settings in ({"stream": path, "alerts": {"to": []}}, {"alerts": {"file": path}}):
        new(**settings)
    monkeypatch.setenv("RANK", "1")
    watching()
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    watching()
    assert "`report` and `watch` will not show them. Set `stream`, or `file`" in caplog.text


def test_a_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    metrics = new(alerts={"file": str(tmp_path / "taken" / "alerts.jsonl"), "cooldown": 0})
    run(metrics, [(None, 1, 1.0)], [("a", 1, 1.0)], [(None, 1, 1.0)])
    assert caplog.text.count("alerts cannot be written") == 1
    assert len(told(caplog)) == 2


def test_pairs_without_a_loss_say_so(caplog: pytest.LogCaptureFixture) -> None:
    schema = Schema("completions", count="samples")
    schema.register(Column("samples", "completions", "completions", total=True))
    metrics = new(metrics=(), schema=schema, alerts={"rate": 0.01})
    for step in (1, 2):
        metrics.add(["a"], {"samples": torch.ones(1)})
        metrics.close(step)
    assert caplog.text.count("need a loss, which completions do not have here") == 1


def test_nothing_is_watched_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = new()
    run(metrics, [(None, 1, 1.0)])
    assert not metrics.on_window and not metrics.totals.notes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"to": ["wandbb"]}, "no target and no `module:function`; did you mean 'wandb'"),
        ({"to": "logger"}, "to of alerts must be a list of names, but is 'logger'"),
        ({"kinds": ["forgetfulness"]}, "'forgetfulness' in kinds of alerts is none"),
        ({"rate": 0}, "rate of alerts must be between 0 and 1, but is 0"),
        ({"unlabeled": 1.0}, "unlabeled of alerts must be between 0 and 1"),
        ({"epochs": "two"}, "epochs of alerts must be a number above 0"),
        ({"cooldown": -1}, "cooldown of alerts must be a whole number"),
        ({"webhook": "https://secret"}, "the name of an environment variable"),
        ({"file": 3}, "file of alerts must be the path of a file"),
        ({"kinds": ["share"]}, "the kind 'share' need `ratios` in the setting `budget`"),
        ({"too": []}, "unknown key 'too' in alerts"),
        ({"to": ["nowhere:tell"]}, "`to` of alerts names 'nowhere:tell', but that cannot be"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        ChannelMetrics(MetricsConfig(alerts=settings))
    assert "https://secret" not in str(error.value)
