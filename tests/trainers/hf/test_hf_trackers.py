"""What W&B, MLflow, SwanLab and Trackio stored of a run, read back, is what the trainer logged."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trackers_run
from paths import python_path

# {key of the log: {step: value}}
Curves = dict[str, dict[int, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    environ = {**os.environ, "PYTHONPATH": python_path()}
    # A run of W&B in this process leaves its service there, which ends with this process only.
    environ.pop("WANDB_SERVICE", None)
    command = [sys.executable, trackers_run.__file__, str(folder)]
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def logged(folder: Path) -> Curves:
    """The channel metrics of the log history, with those of one axis."""
    curves: Curves = {}
    for entry in json.loads((folder / "log_history.json").read_text()):
        for key, value in entry.items():
            if key.startswith(("bbu_", "rru_", "lvis_", "lang_chat_", "domain/")):
                curves.setdefault(key, {})[entry["step"]] = value
    assert {"bbu_loss", "bbu_token_acc", "lvis_tokens", "lang_chat_share"} <= curves.keys()
    assert {"domain/target_loss", "domain/aux_share", "domain/unlabeled_tokens"} <= curves.keys()
    assert set(curves["bbu_loss"]) == {2, 4, 6}
    return curves


def check(stored: Curves, logged: Curves) -> None:
    assert {key: stored.get(key) for key in logged} == logged


def test_wandb_offline(folder: Path, logged: Curves) -> None:
    stored: Curves = {}
    for record in wandb_records(folder):
        items = record.history.item if record.WhichOneof("record_type") == "history" else ()
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
        for key, value in row.items():
            stored.setdefault(key.removeprefix("train/"), {})[row["train/global_step"]] = value
    check(stored, logged)


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of a .wandb file, by SwanLab's reader of it: wandb itself has none any more."""
    from swanlab.converter.wb.wbdatastore import WBDataStoreReader
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2  # made at the import
    with WBDataStoreReader() as reader:
        reader.open(next(folder.rglob("*.wandb")))
        while (data := reader.scan()) is not None:
            record = protocol.Record()
            record.ParseFromString(data)
            yield record


def test_alerts_of_the_first_and_the_last_window(folder: Path) -> None:
    """The last ones are sent when the process ends."""
    told = [json.loads(line) for line in (folder / "alerts.jsonl").read_text().splitlines()]
    assert [(alert["step"], alert["channel"]) for alert in told] == [(2, "bbu"), (6, "lvis")]
    records = wandb_records(folder)
    alerts = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    with sqlite3.connect(folder / "trackio" / "channels.db") as connection:
        stored = connection.execute("select title, text from alerts").fetchall()
    connection.close()
    for found in ([(alert.title, alert.text) for alert in alerts], stored):
        assert [title for title, _ in found] == ["bbu: exhausted", "lvis: exhausted"]
        assert [text.partition(" exhausted: ")[2] for _, text in found] == [
            alert["text"] for alert in told
        ]


def test_mlflow_file_store(folder: Path, logged: Curves, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{folder / 'mlflow'}")
    experiments = [found.experiment_id for found in client.search_experiments()]
    [run] = client.search_runs(experiments)
    stored = {
        key: {m.step: m.value for m in client.get_metric_history(run.info.run_id, key)}
        for key in run.data.metrics
    }
    check(stored, logged)


def test_swanlab_local(folder: Path, logged: Curves) -> None:
    from swanlab.proto.swanlab.record.v1 import record_pb2
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    reader = DataStoreReader()
    reader.open(next((folder / "swanlab").rglob("*.swanlab")))
    stored: Curves = {}
    for data in reader:
        record = record_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("scalar"):
            key = record.scalar.key.removeprefix("train/")
            stored.setdefault(key, {})[record.scalar.step] = record.scalar.value.number
    reader.close()
    check(stored, logged)


def test_trackio(folder: Path, logged: Curves) -> None:
    stored: Curves = {}
    with sqlite3.connect(folder / "trackio" / "channels.db") as connection:
        rows = connection.execute("select metrics from metrics").fetchall()
    connection.close()
    for (metrics,) in rows:
        row = json.loads(metrics)
        for key, value in row.items():
            # Trackio's own steps count the calls.
            stored.setdefault(key.removeprefix("train/"), {})[row["train/global_step"]] = value
    check(stored, logged)


@pytest.mark.parametrize(
    ("format", "below"),
    [("wandb", "."), ("mlflow", "mlflow"), ("swanlab", "swanlab"), ("trackio", "trackio")],
)
def test_the_analysis_reads_what_they_stored(
    folder: Path, logged: Curves, format: str, below: str
) -> None:
    from channel_metrics.analysis.axes import with_axis
    from channel_metrics.analysis.run import load_run

    run = load_run(folder / below, format=format)
    steps, values = with_axis(run, "domain").series("target", "loss")
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == logged["domain/target_loss"]
    for key, expected in logged.items():
        for name in ("bbu", "rru", "lvis", "lang_chat"):
            if key.startswith(f"{name}_"):
                steps, values = run.series(name, key.removeprefix(f"{name}_"))
                assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == expected
