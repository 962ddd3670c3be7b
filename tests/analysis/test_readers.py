"""Each format, written by its own writer, gives the values that were written."""

from __future__ import annotations

import json
import math
import os
import random
import sqlite3
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_tools import (
    CHANNELS,
    Entry,
    expected_series,
    log_key,
    make_history,
    series_of,
    write_jsonl,
)

from channel_metrics import ChannelMetricsError
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.readers.readings import Problems, lines_of
from channel_metrics.analysis.readers.samples import read_sample_order
from channel_metrics.analysis.run import RUN_FILE, Run, load_run, run_names
from channel_metrics.analysis.store import SeriesWriter
from channel_metrics.trainers.megatron.log import log_line

HISTORY = make_history()
BIG_ENOUGH_FOR_TWO_BLOCKS = make_history(steps=200)


def check(run: Run, history: list[Entry], rel: float = 0.0) -> None:
    """The run holds the channels of the history, all values, and no others."""
    assert set(run.channels()) == set(CHANNELS)
    found = {log_key(key) for key in run.keys if key.channel or key.metric == "loss"}
    written = {k for e in history for k in e if k not in ("step", "grad_norm")}
    assert found == written
    for key in run.keys:
        expected = expected_series(history, log_key(key))
        if key.channel or key.metric == "loss":
            assert series_of(run, key.channel, key.metric, key.split) == pytest.approx(
                expected, rel=rel, abs=0
            )


def tensorboard(folder: Path, history: list[Entry]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for entry in history:
            for key, value in entry.items():
                if key != "step":
                    eval_key = key.removeprefix("eval_")
                    tag = f"eval/{eval_key}" if eval_key != key else f"train/{key}"
                    writer.add_scalar(tag, value, entry["step"])
        writer.add_histogram("train/weights", torch.ones(2), 1)
        writer.add_text("train/note", "text", 1)


def test_ms_swift(tmp_path: Path) -> None:
    """As its callback writes it: the step is `10/40`, and the last line is about the run."""
    lines = [
        {k: v for k, v in entry.items() if k != "step"}
        | {"global_step/max_steps": f"{entry['step']}/40", "elapsed_time": "1m 2s", "on": True}
        for entry in HISTORY
    ]
    last = {"last_model_checkpoint": None, "global_step": 40, "log_history": [{"bbu_loss": 9}]}
    write_jsonl(tmp_path / "logging.jsonl", [*lines, last])
    run = load_run(tmp_path)
    check(run, HISTORY)
    assert not run.problems.count


def test_the_newest_folder_of_ms_swift_is_read(tmp_path: Path) -> None:
    for age, (name, value) in enumerate((("v0-a", 1.0), ("v1-b", 2.0))):
        path = write_jsonl(tmp_path / name / "logging.jsonl", [{"step": 1, "loss": value}])
        os.utime(path, (age, age))
    assert series_of(load_run(tmp_path), GLOBAL, "loss") == {1: 2.0}


@pytest.mark.parametrize("steps_as", [str, lambda step: f"{step}/40", int])
def test_the_step_of_ms_swifts_megatron(tmp_path: Path, steps_as: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"iteration": steps_as(3), "loss": 1.5}])
    assert series_of(load_run(path), GLOBAL, "loss") == {3: 1.5}


def test_trainer_state_and_the_newest_checkpoint(tmp_path: Path) -> None:
    for step, history in ((9, HISTORY[:9]), (10, HISTORY)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"best_metric": None, "log_history": history, "max_steps": 40}
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))
    check(load_run(tmp_path), HISTORY)
    check(load_run(tmp_path / "checkpoint-9" / "trainer_state.json"), HISTORY[:9])


def test_a_trainer_state_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    text = json.dumps({"log_history": HISTORY}, indent=2)
    path.write_text(text[: text.index('"step": 20')])
    run = load_run(path)
    assert max(series_of(run, "bbu", "loss")) == 19
    assert run.problems.count == 1
    assert "cut off" in run.problems.examples[0]


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
    pytest.importorskip("wandb", reason="wandb is in both environments, unless taken out by hand")
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
    pytest.importorskip("mlflow", reason="mlflow is in both environments, unless taken out by hand")
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
    with pytest.raises(ChannelMetricsError, match="holds 2 runs"):
        load_run(path)
    assert series_of(load_run(Path(f"{path}#b")), GLOBAL, "loss") == {1: 3.0}


def test_megatron_with_our_lines(tmp_path: Path) -> None:
    """Its own lines, in its own form, and ours as our code writes them."""
    lines = ["using world size: 4", "[2026-01-01] a | bar: 5 | that is no iteration"]
    for entry in HISTORY:
        step = entry["step"]
        values = {k: v for k, v in entry.items() if k not in ("step", "loss", "grad_norm")}
        if "eval_loss" in entry:
            del values["eval_loss"]
            lines.append(
                f" validation loss at iteration {step} | lm loss value: {entry['eval_loss']:.6E} "
                "| lm loss PPL: 2.7E+00 | "
            )
            lines.append(log_line(f"validation at iteration {step}", values))
            continue
        lines.append(
            f" [2026-11-23 03:18:15.477057] iteration {step:8d}/      40 | consumed samples: "
            f"{8 * step:12d} | elapsed time per iteration (ms): 192.7 | "
            f"lm loss: {entry['loss']:.6E} | loss scale: 1.0 | number of nan iterations:   0 |"
        )
        lines.append(log_line(f"iteration {step:8d}", values))
    (tmp_path / "train.log").write_text("\n".join(lines))
    run = load_run(tmp_path)
    check(run, HISTORY, rel=1e-6)
    assert series_of(run, GLOBAL, "consumed samples")[40] == 320


def sample_log(
    history: list[Entry], rng: random.Random
) -> tuple[list[Entry], dict[Any, list[Any]]]:
    """Lines of single samples, shuffled within 50 steps, and {(step, channel): its samples}."""
    lines, groups = [], {}
    for entry in (entry for entry in history if "loss" in entry):
        for name in CHANNELS:
            samples = [(rng.random(), rng.randint(1, 50)) for _ in range(rng.randint(0, 3))]
            if samples:
                groups[entry["step"], name] = samples
            for loss, tokens in samples:
                line = {"step": entry["step"], "id": len(lines), "dataset": name}
                lines.append(line | {"loss": loss, "tokens": tokens})
    lines.sort(key=lambda line: line["step"] + rng.random() * 50)
    return lines, groups


def test_per_sample_logs_are_summed_over_tokens(tmp_path: Path) -> None:
    lines, groups = sample_log(make_history(200), random.Random(0))
    run = load_run(write_jsonl(tmp_path / "samples.jsonl", lines))
    for name in CHANNELS:
        expected = {step: of for (step, channel), of in groups.items() if channel == name}
        losses = {
            s: sum(loss * n for loss, n in of) / sum(n for _, n in of) for s, of in expected.items()
        }
        assert series_of(run, name, "loss") == pytest.approx(losses)
        assert series_of(run, name, "samples") == {s: len(of) for s, of in expected.items()}
        tokens = {s: sum(n for _, n in of) for s, of in expected.items()}
        assert series_of(run, name, "tokens") == tokens
    assert not run.problems.notes


def test_without_token_counts_the_losses_are_means_of_samples_and_that_is_said(
    tmp_path: Path,
) -> None:
    lines = [{"step": 1, "dataset": "a", "loss": x} for x in (1.0, 2.0)]
    run = load_run(write_jsonl(tmp_path / "samples.jsonl", lines))
    assert series_of(run, "a", "loss") == {1: 1.5}
    assert "averaged per sample" in run.problems.notes[0]
    assert not run.has("a", "tokens")


@pytest.mark.parametrize("as_list", [False, True])
def test_the_order_of_the_samples(tmp_path: Path, as_list: bool) -> None:
    data = [{"id": i, "channel": CHANNELS[i % 3], "tokens": 10 + i} for i in range(6)]
    order = ["0", "3", "1", "5", "0", "9"]
    path = tmp_path / "order"
    path.write_text(json.dumps(order) if as_list else "\n".join(order))
    problems = Problems()
    samples = write_jsonl(tmp_path / "data.jsonl", data)
    readings = list(read_sample_order(path, samples, 4, problems, lambda _: None))
    counts = {(s, k.channel): v for s, k, v in readings if k.metric == "samples"}
    assert counts == {
        (1, "bbu"): 2,
        (1, "rru"): 1,
        (1, "lvis"): 1,
        (2, "bbu"): 1,
        (2, "unlabeled"): 1,
    }
    tokens = {(s, k.channel): v for s, k, v in readings if k.metric == "tokens"}
    assert tokens == {(1, "bbu"): 23, (1, "rru"): 11, (1, "lvis"): 15}
    assert problems.count == 1


def test_broken_lines_are_counted_with_their_numbers_and_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "logging.jsonl"
    good = json.dumps({"step": 1, "loss": 1.0})
    broken = [good, '{"step": 2, "lo', "", "[1]", "\xff{", '{"loss": 3.0}', good.replace("1", "4")]
    path.write_bytes("\n".join(broken).encode("latin-1") + b'\n{"step": 5, "loss": NaN}\n')
    run = load_run(path)
    assert list(series_of(run, GLOBAL, "loss")) == [1, 4, 5]
    assert run.problems.count == 4
    lines = [int(example.split(":")[1]) for example in run.problems.examples]
    assert lines == [2, 4, 5, 6]


def test_many_broken_lines_are_all_counted_and_a_few_shown(tmp_path: Path) -> None:
    path = tmp_path / "logging.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n' + "no\n" * 5000)
    run = load_run(path)
    assert run.problems.count == 5000
    assert len(run.problems.examples) == 20


def test_a_line_without_end_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("channel_metrics.analysis.readers.readings.MAX_LINE_BYTES", 100)
    path = tmp_path / "a"
    path.write_text("x" * 1050 + "\nnext\n")
    problems, read = Problems(), []
    assert list(lines_of(path, problems, read.append)) == [(2, "next")]
    assert problems.count == 1
    assert sum(read) == path.stat().st_size


def test_a_step_that_was_logged_twice_keeps_the_last(tmp_path: Path) -> None:
    entries = [
        {"step": s, "loss_bbu": float(v)} for s, v in ((1, 1), (2, 2), (3, 3), (2, 4), (3, 5))
    ]
    run = load_run(write_jsonl(tmp_path / "logging.jsonl", entries))
    assert series_of(run, "bbu", "loss") == {1: 1.0, 2: 4.0, 3: 5.0}
    assert "2 values were logged twice" in run.problems.notes[0]


def test_one_source_is_read_where_a_folder_has_several(tmp_path: Path) -> None:
    tensorboard(tmp_path, HISTORY[:4])
    write_jsonl(tmp_path / "logging.jsonl", HISTORY)
    run = load_run(tmp_path)
    check(run, HISTORY)
    assert run.problems.notes == ["read as jsonl; the run also has tensorboard"]
    assert len(series_of(load_run(tmp_path, format="tensorboard"), "bbu", "loss")) == 4
    with pytest.raises(ChannelMetricsError, match=r"no log of format 'wandb', but jsonl, tens"):
        load_run(tmp_path, format="wandb")


def test_the_configured_mix_names_the_channels(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(json.dumps({"ratios": {"a b": 3, "c": 1}}))
    write_jsonl(tmp_path / "logging.jsonl", [{"step": 1, "a_b_loss": 2.0, "c_d_loss": 3.0}])
    run = load_run(tmp_path)
    assert run.ratios == {"a b": 3.0, "c": 1.0}
    assert run.channels() == ["a b", "c"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "holds no log"),
        (lambda root: (root / "logging.jsonl").write_text("no\n"), r"logging.jsonl:1: is no JSON"),
        (lambda root: (root / "logging.jsonl").write_text(""), "expected values"),
    ],
)
def test_nothing_to_read_is_an_error_that_says_so(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    with pytest.raises(ChannelMetricsError, match=message):
        load_run(tmp_path)
    with pytest.raises(ChannelMetricsError, match="does not exist"):
        load_run(tmp_path / "none")


def test_the_store_keeps_millions_of_readings_in_order_and_in_little_memory() -> None:
    rng = random.Random(0)
    tracemalloc.start()
    with SeriesWriter() as writer:
        for step in range(60_000):
            for key in ("a", "b", "c", "d"):
                if key != "c" or rng.random() < 0.1:
                    writer.add(step, key, step + ord(key))
        store = writer.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(store) > 180_000
    # As columns of three numbers, all readings would be 4.5 MB.
    assert peak < 8 * 2**20
    steps, values = store.series("d")
    assert (values == steps + ord("d")).all()
    assert steps.tolist() == list(range(60_000))


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "run"]
    assert run_names(paths[:1]) == ["run"]
    assert run_names(paths[:2]) == ["a/run", "b/run"]
    assert len(set(run_names(paths))) == 3
