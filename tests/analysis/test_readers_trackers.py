"""Logs of TensorBoard, W&B and MLflow, each by its own writer, give what was written."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.analysis_tools import (
    make_history,
    series_of,
    write_jsonl,
)
from analysis.reader_tools import HISTORY, check, tensorboard
from channel_metrics import ChannelMetricsError
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.run import load_run

BIG_ENOUGH_FOR_TWO_BLOCKS = make_history(steps=200)


def test_tensorboard(tmp_path: Path) -> None:
    tensorboard(tmp_path / "runs" / "x", HISTORY)
    check(load_run(tmp_path), HISTORY, rel=1e-6)


def test_a_damaged_event_file_gives_what_stands_before(tmp_path: Path) -> None:
    tensorboard(tmp_path, HISTORY)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-2000])
    run = load_run(tmp_path)
    assert 0 < len(series_of(run, "bbu", "loss")) <= 40
    assert run.problems.count == 1
    assert "ends at byte" in run.problems.examples[0]


WANDB = """
import json, sys
import wandb
run = wandb.init(project="x", dir=sys.argv[1], settings=wandb.Settings(x_disable_stats=True))
for entry in json.load(open(sys.argv[2])):
    step = entry.pop("step")
    names = {k: "eval/" + k[5:] if k.startswith("eval_") else "train/" + k for k in entry}
    logged = {names[key]: value for key, value in entry.items()}
    wandb.log(logged | {"train/global_step": step, "note": "text"})
run.finish()
"""


def test_wandb_offline(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(json.dumps(BIG_ENOUGH_FOR_TWO_BLOCKS))
    subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path), str(tmp_path / "history.json")],
        env=os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    (path,) = tmp_path.rglob("*.wandb")
    assert path.stat().st_size > 2 * 32 * 1024
    run = load_run(tmp_path)
    check(run, BIG_ENOUGH_FOR_TWO_BLOCKS)
    assert not run.problems.count
    path.write_bytes(path.read_bytes()[:-3000])
    cut = load_run(path)
    assert cut.problems.count
    assert 100 < len(series_of(cut, "bbu", "loss")) <= 200


MLFLOW = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
with mlflow.start_run():
    for entry in json.load(open(sys.argv[2])):
        mlflow.log_metrics(entry, step=entry.pop("step"))
"""


def test_mlflow(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    subprocess.run(
        [sys.executable, "-c", MLFLOW, f"file://{tmp_path}/mlruns", str(tmp_path / "history.json")],
        env=os.environ | {"MLFLOW_ALLOW_FILE_STORE": "true"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
    )
    check(load_run(tmp_path), HISTORY)


def test_mlflow_database_by_its_schema(tmp_path: Path) -> None:
    """The table as MLflow makes it; two runs in it must be told apart.

    Not by MLflow itself: what writes databases is not in mlflow-skinny.
    """
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE metrics (key TEXT, value DOUBLE, timestamp BIGINT, run_uuid TEXT, "
            "step BIGINT, is_nan BOOLEAN)"
        )
        rows = [("loss", 0.0, 1, "a", 1, True), ("loss", 2.0, 2, "a", 2, False)]
        database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
    series = series_of(load_run(path), GLOBAL, "loss")
    assert math.isnan(series[1])
    assert series[2] == 2.0
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO metrics VALUES ('loss', 3.0, 1, 'b', 1, 0)")
    # The newest run is read, and a note says so.
    newest = load_run(path)
    assert series_of(newest, GLOBAL, "loss").keys() == {1, 2}
    assert "has 2 runs; this is a. Others are read as mlflow.db#RUN" in newest.problems.notes[0]
    with pytest.raises(ChannelMetricsError, match=r"has no run 'c'; there are b, a"):
        load_run(Path(f"{path}#c"))
    assert series_of(load_run(Path(f"{path}#b")), GLOBAL, "loss") == {1: 3.0}


def test_one_source_is_read_where_a_folder_has_several(tmp_path: Path) -> None:
    tensorboard(tmp_path, HISTORY[:4])
    write_jsonl(tmp_path / "logging.jsonl", HISTORY)
    run = load_run(tmp_path)
    check(run, HISTORY)
    assert run.problems.notes == ["read as jsonl; the run also has tensorboard"]
    assert len(series_of(load_run(tmp_path, format="tensorboard"), "bbu", "loss")) == 4
    with pytest.raises(ChannelMetricsError, match=r"no log of format 'wandb', but jsonl, tens"):
        load_run(tmp_path, format="wandb")
