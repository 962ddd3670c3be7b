"""The command: tables, events, notes, exit codes; big logs in little memory."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

from pyarrow import parquet
from typer.testing import CliRunner

from analysis.analysis_tools import make_history, run_of, series_of, write_jsonl
from channel_metrics.analysis.run import load_run
from channel_metrics.cli.main import app

MEMORY = """
import resource, sys
from pathlib import Path
import numpy
from channel_metrics.analysis.run import load_run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = load_run(Path(sys.argv[1]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak - before, len(run.store), run.problems.count)
"""


def test_tables_and_events_hold_what_the_log_holds(tmp_path: Path) -> None:
    history = make_history()
    write_jsonl(tmp_path / "run" / "logging.jsonl", history)
    done = CliRunner().invoke(app, ["analyze", str(tmp_path / "run"), "--csv"])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "run" / "channel_analysis"
    expected = series_of(run_of(history), "bbu", "loss")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(folder / "metrics.parquet").to_pylist()
    for found in (rows, table):
        curve = {
            int(row["step"]): float(row["value"])
            for row in found
            if (row["split"], row["channel"], row["metric"]) == ("train", "bbu", "loss")
        }
        assert curve == expected
    events = load_run(folder / "tensorboard" / "run", format="tensorboard")
    assert series_of(events, "bbu", "loss").keys() == expected.keys()
    # What was written is not read as the run the next time.
    assert load_run(tmp_path / "run").problems.notes == []


def test_samples_give_estimates_and_the_output_says_so(tmp_path: Path) -> None:
    history = make_history(steps=60)
    log = [{"step": e["step"], "loss": e["loss"]} for e in history if "loss" in e]
    write_jsonl(tmp_path / "logging.jsonl", log)
    lines = [
        {"step": e["step"], "dataset": name, "tokens": e[f"{name}_tokens"]}
        for e in history
        for name in ("bbu", "rru", "lvis")
        if f"{name}_tokens" in e
    ]
    samples = write_jsonl(tmp_path / "samples.log", lines)
    done = CliRunner().invoke(
        app, ["analyze", str(tmp_path / "logging.jsonl"), "--csv", "--samples", str(samples)]
    )
    assert done.exit_code == 0, done.output
    assert "estimated from 60 windows" in done.output
    text = (tmp_path / "channel_analysis" / "metrics.csv").read_text()
    assert "bbu,loss_estimate_low," in text
    wrong = CliRunner().invoke(
        app, ["analyze", str(tmp_path / "logging.jsonl"), "--batch-size", "4"]
    )
    assert wrong.exit_code == 2
    assert "--sample-data and --batch-size explain --samples" in wrong.output


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """30 MB of samples; as objects in memory they would take ten times that."""
    path = tmp_path / "samples.jsonl"
    with path.open("w") as file:
        for step in range(2500):
            for sample in range(60):
                line = {"step": step, "id": sample, "dataset": f"d{sample % 5}", "loss": 1.5}
                file.write(json.dumps(line | {"tokens": 100, "text": "x" * 110}) + "\n")
            if step % 500 == 0:
                file.write("broken\n")
    assert path.stat().st_size > 28e6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    grown_kb, values, broken = map(int, done.stdout.split())
    # Per step: samples, tokens and loss of 5 channels, and the loss of all.
    assert (values, broken) == (2500 * 16, 5)
    assert grown_kb < 24 * 1024
