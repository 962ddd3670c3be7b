"""Where alerts go: a webhook, trackio, wandb, a function. None of them delays or breaks a run."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from session_tools import batch, new
from webhook_tools import VARIABLE, serve

from channel_metrics import ConfigError
from channel_metrics.observers import sending
from channel_metrics.observers.alerts import Alert, AlertObserver
from channel_metrics.observers.sending import Sender
from channel_metrics.session import ChannelMetrics

__all__ = ["serve"]

ALERT = Alert("forgetting", "a", "train", 3, "it rose")
TOLD: list[Alert] = []


def tell(alert: Alert) -> None:
    TOLD.append(alert)


def watching(*to: str, **alerts: Any) -> ChannelMetrics:
    return new(alerts={"to": list(to), "kinds": ["nonfinite"], "cooldown": 0, **alerts})


def train(metrics: ChannelMetrics, windows: int) -> float:
    """Every second window has an alert; returns how long it took."""
    begin = time.monotonic()
    for step in range(1, windows + 1):
        metrics.count(batch(("a", 2, float("nan") if step % 2 else 1.0)))
        metrics.close(step)
    return time.monotonic() - begin


def senders(metrics: ChannelMetrics) -> list[Sender]:
    (observer,) = metrics.on_window
    assert isinstance(observer, AlertObserver)
    return observer._senders


def close(metrics: ChannelMetrics) -> None:
    for sender in senders(metrics):
        sender.close()


def test_a_webhook_gets_json(serve: Any) -> None:
    server, metrics = serve(), watching("webhook")
    train(metrics, 1)
    close(metrics)
    (body,) = server.bodies
    assert (body["alert"], body["channel"], body["step"]) == ("nonfinite", "a", 1)
    assert body["text"].startswith("alert at step 1: a: nonfinite: 2 of 2 tokens")


def test_a_slow_webhook_delays_nothing(serve: Any) -> None:
    server = serve(seconds=60)
    metrics = watching("webhook")
    assert train(metrics, 20) < 5
    assert server.arrived.wait(10) and len(server.bodies) == 1, "the others wait"
    begin = time.monotonic()
    senders(metrics)[0].close(seconds=0.3)
    assert time.monotonic() - begin < 5


def test_a_full_queue_drops_alerts(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    serve(seconds=60)
    metrics = watching("webhook")
    assert train(metrics, 2 * sending._MAX_WAITING + 10) < 10
    assert caplog.text.count("alerts do not reach the webhook: more than 100 alerts wait") == 1
    begin = time.monotonic()
    senders(metrics)[0].close(seconds=0.3)
    assert time.monotonic() - begin < 5


def test_a_failing_webhook_is_told_once_and_its_address_never(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(status=500)
    metrics = watching("webhook")
    train(metrics, 4)
    close(metrics)
    assert len(server.bodies) == 2, "each alert is tried"
    assert caplog.text.count("alerts do not reach the webhook: HTTPError") == 1
    monkeypatch.setenv(VARIABLE, "http://127.0.0.1:9/secret-token")
    metrics = watching("webhook")
    train(metrics, 2)
    close(metrics)
    assert "alerts do not reach the webhook: URLError" in caplog.text
    assert "secret-token" not in caplog.text and "127.0.0.1" not in caplog.text


def test_a_webhook_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTHER", raising=False)
    with pytest.raises(ConfigError, match="environment variable OTHER must hold, but it is not s"):
        watching("webhook", webhook="OTHER")
    monkeypatch.setenv("OTHER", "ftp://secret-token")
    with pytest.raises(ConfigError, match="but it holds none") as error:
        watching("webhook", webhook="OTHER")
    assert "secret" not in str(error.value)
    monkeypatch.setenv("RANK", "1")
    watching("webhook", webhook="OTHER")


def test_at_the_end_of_the_process_what_waits_is_sent_within_a_limit(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = serve(seconds=100)
    monkeypatch.setenv("HANGS", hangs.address)
    server = serve(seconds=0.3)
    script = (
        "import test_alert_targets as t;"
        "t.train(t.watching('webhook', webhook='HANGS'), 6);"
        "t.train(t.watching('webhook'), 6)"
    )
    subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, check=True, timeout=90
    )
    assert [body["step"] for body in server.bodies] == [1, 3, 5]
    assert len(hangs.bodies) == 1


def test_a_function_by_its_path(caplog: pytest.LogCaptureFixture) -> None:
    own = sys.modules["test_alert_targets"]
    own.TOLD.clear()
    metrics = watching("test_alert_targets:tell", "math:sqrt")
    train(metrics, 4)
    close(metrics)
    assert [alert.step for alert in own.TOLD] == [1, 3]
    assert caplog.text.count("alerts do not reach math:sqrt: TypeError") == 1


TRACKIO = """
import test_alert_targets as t, trackio
t.run_of("trackio")
run = trackio.init(project="alerts", name="one", embed=False)
t.run_of("trackio")
trackio.finish()
"""


def run_of(target: str) -> None:
    metrics = watching(target)
    train(metrics, 1)
    close(metrics)


def test_a_run_of_trackio(tmp_path: Path) -> None:
    """In a process of its own, because trackio starts a server. What it has stored is read."""
    ended = subprocess.run(
        [sys.executable, "-c", TRACKIO],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert not ended.returncode and ended.stderr.count("alerts do not reach trackio") == 1, ended
    assert "no run of trackio is open" in ended.stderr
    with sqlite3.connect(tmp_path / "alerts.db") as connection:
        stored = connection.execute("SELECT title, text, level FROM alerts").fetchall()
    ((title, text, level),) = stored
    assert (title, level) == ("a: nonfinite", "warn")
    assert text.startswith("alert at step 1: a: nonfinite: 2 of 2 tokens")


def test_a_run_of_wandb(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import wandb

    run_of("wandb")
    assert "no run of wandb is open" in caplog.text
    with wandb.init(mode="offline", dir=tmp_path, project="alerts"):
        run_of("wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + 20
    while b"a: nonfinite" not in file.read_bytes() and time.monotonic() < end:
        time.sleep(0.1)  # a process of wandb writes it
    assert b"a: nonfinite" in file.read_bytes()
    assert caplog.text.count("alerts do not reach") == 1
