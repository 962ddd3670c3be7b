"""Trackio, SwanLab and W&B's tables: real stores where the program can be had, else its form."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.analysis_tools import make_history, run_of, series_of
from analysis.reader_tools import HISTORY, check
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.run import load_run
from channel_metrics.analysis.write import write_csv
from channel_metrics.errors import ChannelMetricsError

TRACKIO = """
import json, sys
import trackio
for name in ("old", "new"):
    trackio.init(project="p", name=name)
    for entry in json.load(open(sys.argv[1])):
        trackio.log({"global_step" if k == "step" else k: v for k, v in entry.items()})
    trackio.log({"loss": float("nan"), "global_step": 41})
    trackio.finish()
"""
SWANLAB = """
import json, sys
import swanlab
swanlab.init(mode="local", logdir=sys.argv[2], project="p")
for entry in json.load(open(sys.argv[1])):
    swanlab.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])
swanlab.finish()
"""


def run_script(script: str, folder: Path) -> None:
    (folder / "history.json").write_text(json.dumps(HISTORY))
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "history.json"), str(folder / "logs")],
        env=os.environ | {"TRACKIO_DIR": str(folder / "logs")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "history.json").unlink()


def test_trackio(tmp_path: Path) -> None:
    run_script(TRACKIO, tmp_path)
    run = load_run(tmp_path)
    assert "p.db has 2 runs; this is new. Others are read as p.db#RUN, with one of old" in str(
        run.problems.notes
    )
    losses = series_of(run, GLOBAL, "loss")
    assert math.isnan(losses.pop(41))
    assert losses == series_of(run_of(HISTORY), GLOBAL, "loss")
    assert series_of(run, "bbu", "tokens") == series_of(run_of(HISTORY), "bbu", "tokens")
    named = load_run(Path(f"{tmp_path}/logs/p.db#old"))
    assert series_of(named, "rru", "loss") == series_of(run_of(HISTORY), "rru", "loss")
    with pytest.raises(ChannelMetricsError, match=r"has no run 'x'; there are old, new"):
        load_run(Path(f"{tmp_path}/logs/p.db#x"))


def test_swanlab(tmp_path: Path) -> None:
    run_script(SWANLAB, tmp_path)
    run = load_run(tmp_path)
    check(run, HISTORY, rel=1e-6)
    assert not run.problems.count


def write_old_swanlab(path: Path, records: list[Any]) -> None:
    """A file in the form that SwanLab 0.6.12 and 0.7.20 wrote; texts are written as they are."""
    blobs = [r if isinstance(r, str) else json.dumps(r) for r in records]
    frames = [struct.pack("<IHB", 0, len(b.encode()), 1) + b.encode() for b in blobs]
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack("<4sHB", b":SWL", 0xE1D6, 1) + b"".join(frames))


def scalar(key: str, step: int, value: float | str) -> Any:
    metric = {"index": step, "data": value, "create_time": "2026-11-28T19:56:50.342892+00:00"}
    data = {"metric": metric, "key": key, "step": step, "epoch": step}
    return {"model_type": "Scalar", "data": data}


def test_swanlab_of_older_versions(tmp_path: Path) -> None:
    records: list[Any] = [
        {"model_type": "Header", "data": {"backup_type": "DEFAULT"}},
        {"model_type": "Column", "data": {"key": "loss", "kid": "0", "column_type": "FLOAT"}},
    ]
    for entry in HISTORY:
        own = {key: value for key, value in entry.items() if key != "step"}
        records += [scalar(key, entry["step"], value) for key, value in own.items()]
    records += [scalar("loss", 99, "NaN"), scalar("__swanlab__.cpu.pct", 0, 12.5)]
    write_old_swanlab(tmp_path / "run-1" / "backup.swanlab", records)
    run = load_run(tmp_path)
    losses = series_of(run, GLOBAL, "loss")
    assert math.isnan(losses.pop(99))
    assert losses == series_of(run_of(HISTORY), GLOBAL, "loss")
    assert series_of(run, "bbu", "tokens") == series_of(run_of(HISTORY), "bbu", "tokens")
    assert not run.problems.count
    assert not any("swanlab" in key.metric for key in run.keys)


def test_damaged_records_of_older_swanlab_are_problems(tmp_path: Path) -> None:
    lost = scalar("loss", 2, 2.0)
    del lost["data"]["step"]
    records = [scalar("loss", 1, 3.0), "{broken", lost, scalar("loss", 3, "x")]
    write_old_swanlab(tmp_path / "run-1" / "backup.swanlab", records)
    run = load_run(tmp_path)
    assert series_of(run, GLOBAL, "loss") == {1: 3.0}
    assert run.problems.count == 3


def test_our_own_table(tmp_path: Path) -> None:
    runs = [run_of(make_history(steps=4), name="a"), run_of(HISTORY, name="b")]
    write_csv(runs, tmp_path / "metrics.csv")
    run = load_run(tmp_path / "metrics.csv")
    check(run, HISTORY)
    assert "has 2 runs; this is b" in run.problems.notes[0]
    first = load_run(Path(f"{tmp_path / 'metrics.csv'}#a"))
    assert list(series_of(first, GLOBAL, "loss")) == [1, 2, 3, 4]


def test_a_chart_that_wandb_exported(tmp_path: Path) -> None:
    """A column for each run, and its lowest and highest value; gaps are empty cells."""
    (tmp_path / "wandb_export.csv").write_text(
        '"Step","night-1 - train/bbu_loss","night-1 - train/bbu_loss__MIN",'
        '"night-1 - train/bbu_loss__MAX"\n"10","2.5","2.4","2.6"\n"20","","",""\n'
        '"30","1.5","1.4","1.6"\n'
    )
    run = load_run(tmp_path)
    assert series_of(run, "bbu", "loss") == {10: 2.5, 30: 1.5}
    assert len(run.keys) == 1


def test_a_history_that_wandb_exported(tmp_path: Path) -> None:
    """`run.history().to_csv()`: `_step` counts the calls, so the step of the training is taken."""
    (tmp_path / "history.csv").write_text(
        ",_step,_runtime,train/global_step,train/loss,train/bbu_loss,note\n"
        "0,0,1.5,10,2.5,2.25,a text\n1,1,3.0,20,NaN,2.0,\n2,2,4.5,x,1.5,1.0,\n"
    )
    run = load_run(tmp_path)
    assert series_of(run, "bbu", "loss") == {10: 2.25, 20: 2.0}
    assert run.problems.examples == [f"{tmp_path / 'history.csv'}:4: has no step"]
    assert math.isnan(series_of(run, GLOBAL, "loss")[20])


def test_the_csv_of_lightning(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="x")
    for entry in HISTORY:
        logger.log_metrics({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])
    logger.save()
    check(load_run(Path(logger.log_dir)), HISTORY)


def test_llama_factory(tmp_path: Path) -> None:
    """`trainer_log.jsonl`, as its LogCallback writes it; beside a state, the state says more."""
    lines = [
        {"current_steps": 5, "total_steps": 20, "loss": 1.5, "lr": 1e-4, "epoch": 0.25}
        | {"percentage": 25.0, "elapsed_time": "0:00:05", "remaining_time": "0:00:15"},
        {"current_steps": 10, "total_steps": 20, "eval_loss": 1.25, "epoch": 0.5},
        {"current_steps": 10, "total_steps": 20, "loss": 1.0, "lr": 5e-5, "epoch": 0.5},
    ]
    path = tmp_path / "trainer_log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load_run(tmp_path)
    assert run.origin.endswith("trainer_log")
    assert series_of(run, GLOBAL, "loss") == {5: 1.5, 10: 1.0}
    assert series_of(run, GLOBAL, "loss", "eval") == {10: 1.25}
    assert series_of(run, GLOBAL, "lr") == {5: 1e-4, 10: 5e-5}
    assert series_of(run, GLOBAL, "total_steps") == {}
    assert run.channels() == []
    state = {"log_history": [{"step": 5, "loss": 1.5, "loss_bbu": 1.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    both = load_run(tmp_path)
    assert both.channels() == ["bbu"]
    assert both.problems.notes == ["read as trainer_state; the run also has trainer_log"]
