"""Logs of lines, written as their trainers write them, give the values that were written."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from analysis.analysis_tools import (
    series_of,
    write_jsonl,
)
from analysis.reader_tools import HISTORY, check
from channel_metrics import ChannelMetricsError
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.readers.lines import lines_of
from channel_metrics.analysis.readers.readings import Problems
from channel_metrics.analysis.run import RUN_FILE, load_run, run_names
from channel_metrics.analysis.store import SeriesWriter
from channel_metrics.trainers.megatron.log import log_line


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


def test_two_records_on_one_line(tmp_path: Path) -> None:
    """Two processes may write at the same time; the third record is cut off."""
    path = tmp_path / "logging.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}{"step": 2, "loss": 2.0} {"step": 3, "lo\n')
    run = load_run(path)
    assert series_of(run, GLOBAL, "loss") == {1: 1.0, 2: 2.0}
    assert run.problems.count == 1


def test_many_broken_lines_are_all_counted_and_a_few_shown(tmp_path: Path) -> None:
    path = tmp_path / "logging.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n' + "no\n" * 5000)
    run = load_run(path)
    assert run.problems.count == 5000
    assert len(run.problems.examples) == 20


def test_values_before_a_resume_are_counted_without_channels(tmp_path: Path) -> None:
    entries = [{"step": s, "loss": 1.0, "epoch": s / 9} for s in (*range(1, 7), *range(3, 9))]
    notes = load_run(write_jsonl(tmp_path / "logging.jsonl", entries)).problems.notes
    assert notes == [
        "the log goes back to step 3, as after a resume: 8 values that were logged before are left "
        "out"
    ]


def test_a_line_without_end_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("channel_metrics.analysis.readers.lines.MAX_LINE_BYTES", 100)
    path = tmp_path / "a"
    path.write_text("x" * 1050 + "\nnext\n")
    problems = Problems()
    read: list[int] = []
    assert list(lines_of(path, problems, read.append)) == [(2, "next")]
    assert problems.count == 1
    assert sum(read) == path.stat().st_size


def test_a_step_that_was_logged_twice_keeps_the_last(tmp_path: Path) -> None:
    entries = [
        {"step": s, "loss_bbu": float(v)} for s, v in ((1, 1), (2, 2), (3, 3), (2, 4), (3, 5))
    ]
    run = load_run(write_jsonl(tmp_path / "logging.jsonl", entries))
    assert series_of(run, "bbu", "loss") == {1: 1.0, 2: 4.0, 3: 5.0}
    assert "goes back to step 2, as after a resume: 2 values" in run.problems.notes[0]
    assert run.resumes == (2,)
    assert [part.tolist() for part in run.overwritten("bbu", "loss")] == [[2, 3], [2.0, 3.0]]


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
