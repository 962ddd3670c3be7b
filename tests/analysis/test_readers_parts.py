"""Which files of a folder are one run that was resumed, and which are separate runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from analysis.analysis_tools import (
    CHANNELS,
    Entry,
    make_history,
    run_of,
    series_of,
    write_jsonl,
)
from analysis.reader_tools import tensorboard
from analysis.watch_tools import following
from channel_metrics.analysis.readers.keys import GLOBAL, is_over_steps, is_training
from channel_metrics.analysis.run import load_run
from channel_metrics.analysis.watch.screen import header, view_of
from channel_metrics.trainers.megatron.log import log_line

# A job ran to step 30 and was resumed from step 20, with other losses from there on.
FIRST = [entry for entry in make_history(40) if entry["step"] <= 30]
SECOND = [entry for entry in make_history(40, seed=1) if entry["step"] > 20]
KEPT = [entry for entry in FIRST if entry["step"] <= 20] + SECOND


def write_text(path: Path, history: list[Entry]) -> None:
    lines = []
    for entry in history:
        values = {key: value for key, value in entry.items() if key not in ("step", "eval_loss")}
        where = "validation at iteration" if "eval_loss" in entry else "iteration"
        lines.append(log_line(f"{where} {entry['step']:8d}", values))
    path.write_text("".join(f"{line}\n" for line in lines))


def write_swift(path: Path, history: list[Entry]) -> None:
    lines = [dict(entry) for entry in history]
    for line in lines:
        line["global_step/max_steps"] = f"{line.pop('step')}/40"
    write_jsonl(path, lines)


WRITERS: list[Any] = [
    pytest.param(write_text, "slurm-99.out", "slurm-100.out", id="slurm"),
    pytest.param(write_swift, "v9-2026/logging.jsonl", "v10-2026/logging.jsonl", id="ms-swift"),
    pytest.param(tensorboard, "Nov28_10_h", "Nov28_11_h", id="tensorboard"),
    pytest.param(write_jsonl, "a.1.jsonl", "a.2.jsonl", id="jsonl"),
]


@pytest.mark.parametrize(("write", "first", "second"), WRITERS)
def test_resumed_parts_are_one_run(tmp_path: Path, write: Any, first: str, second: str) -> None:
    write(tmp_path / first, FIRST)
    write(tmp_path / second, SECOND)
    run, expected = load_run(tmp_path), run_of(KEPT)
    for name in (*CHANNELS, GLOBAL):
        for metric in ("loss", "tokens"):
            assert series_of(run, name, metric) == pytest.approx(
                series_of(expected, name, metric), rel=1e-6
            )
    for name in CHANNELS:
        assert list(series_of(run, name, "loss", "eval")) == [20, 40]
    assert run.resumes == (21,)
    steps, losses = run.overwritten("bbu", "loss")
    before = series_of(run_of(FIRST), "bbu", "loss")
    assert dict(zip(steps.tolist(), losses.tolist(), strict=True)) == pytest.approx(
        {step: loss for step, loss in before.items() if step > 20}, rel=1e-6
    )
    notes = " | ".join(run.problems.notes)
    assert "joined as one run: " in notes
    assert first in notes
    assert second in notes
    assert "goes back to step 21, as after a resume" in notes


@pytest.mark.parametrize(("write", "first", "second"), WRITERS)
def test_separate_runs_are_not_merged(tmp_path: Path, write: Any, first: str, second: str) -> None:
    """The newest is read, and a note names the other."""
    history = {first: make_history(30, seed=2), second: make_history(40, seed=3)}
    for age, (name, entries) in enumerate(history.items()):
        write(tmp_path / name, entries)
        for file in [tmp_path / name, *(tmp_path / name).glob("*")]:
            os.utime(file, (age, age))
    run = load_run(tmp_path)
    expected = run_of(history[second])
    assert series_of(run, "bbu", "loss") == pytest.approx(
        series_of(expected, "bbu", "loss"), rel=1e-6
    )
    assert run.resumes == ()
    assert [note for note in run.problems.notes if "other runs in the folder" in note]
    assert first in " ".join(run.problems.notes)


def test_a_rare_channel_of_the_overwritten_branch_is_left_out(tmp_path: Path) -> None:
    """It was not logged again, but no model that was kept has seen it."""
    lines = [{"step": s, "loss": 1.0, "bbu_loss": 1.0, "bbu_tokens": 5} for s in range(1, 11)]
    lines[7] |= {"rare_loss": 3.0, "rare_tokens": 2}
    lines += [{**line, "loss": 2.0} for line in lines[5:7]]
    run = load_run(write_jsonl(tmp_path / "a.jsonl", lines))
    assert series_of(run, GLOBAL, "loss") == {**dict.fromkeys(range(1, 6), 1.0), 6: 2.0, 7: 2.0}
    assert run.channels() == ["bbu", "rare"]
    assert series_of(run, "rare", "loss") == {}
    assert run.overwritten("rare", "loss")[0].tolist() == [8]


def test_two_resumes_and_a_key_that_begins_later(tmp_path: Path) -> None:
    """After the second resume, which goes back further, the log gains a key."""
    parts = [range(1, 9), range(6, 12), range(4, 7)]
    lines = [
        {"new": 1.0, "step": s, "loss": float(part)}
        if part == 2
        else {"step": s, "loss": float(part)}
        for part, steps in enumerate(parts)
        for s in steps
    ]
    run = load_run(write_jsonl(tmp_path / "a.jsonl", lines))
    assert series_of(run, GLOBAL, "loss") == {1: 0, 2: 0, 3: 0, 4: 2, 5: 2, 6: 2}
    assert list(series_of(run, GLOBAL, "new")) == [4, 5, 6]
    assert run.resumes == (6, 4)


def test_a_late_evaluation_is_no_resume(tmp_path: Path) -> None:
    """Some trainers evaluate a checkpoint while the training goes on."""
    lines = [{"step": s, "loss": 1.0} for s in range(1, 9)]
    lines += [
        {"step": 3, "eval_loss": 2.0},
        {"step": 9, "loss": 1.0},
        {"step": 2, "eval_loss": 2.5},
    ]
    run = load_run(write_jsonl(tmp_path / "a.jsonl", lines))
    assert list(series_of(run, GLOBAL, "loss")) == list(range(1, 10))
    assert list(series_of(run, GLOBAL, "loss", "eval")) == [2, 3]
    assert run.resumes == ()
    # Megatron repeats its values over samples, on another scale.
    assert not is_training("lm loss validation-web")
    assert not is_training("lm loss vs samples")
    assert not is_over_steps("lm loss vs samples")
    assert is_training("lm loss")


def test_training_and_validation_of_automodel_are_one_run(tmp_path: Path) -> None:
    """Its `train_ft.py` writes `training.jsonl`, and a file for each validation set."""
    more = {"epoch": 0, "timestamp": "2026-01-01T00:00:00.000Z", "lr": 0.1, "num_label_tokens": 9}
    write_jsonl(tmp_path / "training.jsonl", [{"step": s, "loss": 1.0} | more for s in range(8)])
    for name, loss in (("", 2.0), ("_web", 3.0), ("_code", 4.0)):
        lines = [{"step": s, "val_loss": loss} | more | {"num_label_tokens": 5} for s in (3, 7)]
        write_jsonl(tmp_path / f"validation{name}.jsonl", lines)
    run = load_run(tmp_path)
    assert len(series_of(run, GLOBAL, "loss")) == 8
    assert set(series_of(run, GLOBAL, "num_label_tokens").values()) == {9.0}
    for name, loss in (("", 2.0), ("web", 3.0), ("code", 4.0)):
        assert series_of(run, name, "loss", "eval") == {3: loss, 7: loss}
    assert run.resumes == ()


def test_a_file_with_other_keys_belongs_to_the_same_run(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"step": s, "loss": 1.0} for s in range(8)])
    write_jsonl(tmp_path / "b.jsonl", [{"step": s, "mem": 2.0} for s in (0, 4)])
    run = load_run(tmp_path)
    assert len(series_of(run, GLOBAL, "loss")) == 8
    assert series_of(run, GLOBAL, "mem") == {0: 2.0, 4: 2.0}


def test_a_run_with_a_longer_interval_is_no_resume(tmp_path: Path) -> None:
    """Its first step is 50 because it logs every 50 steps."""
    write_jsonl(tmp_path / "a.jsonl", [{"step": s, "loss": 1.0} for s in range(10, 100, 10)])
    write_jsonl(tmp_path / "b.jsonl", [{"step": s, "loss": 2.0} for s in range(50, 300, 50)])
    run = load_run(tmp_path)
    assert len({*series_of(run, GLOBAL, "loss").values()}) == 1


def test_a_job_that_has_logged_nothing_yet_does_not_hide_the_one_before(tmp_path: Path) -> None:
    write_text(tmp_path / "slurm-99.out", FIRST)
    (tmp_path / "slurm-100.out").write_text("building the datasets\n")
    write_swift(tmp_path / "ms" / "v0-a" / "logging.jsonl", FIRST)
    (tmp_path / "ms" / "v1-b").mkdir()
    (tmp_path / "ms" / "v1-b" / "logging.jsonl").touch()
    for folder in (tmp_path, tmp_path / "ms"):
        assert max(series_of(load_run(folder), GLOBAL, "loss")) == 30


def test_watch_joins_parts_too(tmp_path: Path, no_rest: None) -> None:
    write_text(tmp_path / "slurm-99.out", FIRST)
    follower = following(tmp_path)
    follower.look(to_end=True)
    assert max(trace.step or 0 for trace in follower.traces.values()) == 30
    write_text(tmp_path / "slurm-100.out", SECOND)
    follower.look(to_end=True)
    tokens = series_of(run_of(KEPT), "bbu", "tokens")
    assert follower.traces["bbu_tokens"].total == sum(tokens.values())
    lines = header(follower, view_of(follower.traces))
    assert lines[1].startswith("joined as one run: ")


def test_a_later_resume_from_an_earlier_step_overwrites_all_branches_before() -> None:
    branches = (range(1, 101), range(50, 81), range(30, 41))
    log = [
        {"step": step, "a_loss": float(number), "a_tokens": 1.0}
        for number, steps in enumerate(branches)
        for step in steps
    ]
    run = run_of(log, channels=["a"])
    assert run.resumes == (50, 30)
    kept = dict.fromkeys(range(1, 30), 0.0) | dict.fromkeys(range(30, 41), 2.0)
    assert series_of(run, "a", "loss") == kept
    assert sorted(set(run.overwritten("a", "loss")[0].tolist())) == list(range(30, 101))


def test_two_runs_that_begin_at_the_same_late_step_are_not_joined(tmp_path: Path) -> None:
    for folder in ("v0-20260101", "v1-20260102"):
        log = [{"step": step, "loss": 1.0} for step in range(500, 600, 10)]
        write_jsonl(tmp_path / folder / "logging.jsonl", log)
    run = load_run(tmp_path)
    assert run.resumes == () and len(run.store) == 10
    assert any("other runs in the folder" in note for note in run.problems.notes)


def test_a_log_that_begins_a_little_after_its_interval_is_a_run_of_its_own(tmp_path: Path) -> None:
    for folder, first in (("v0-20260101", 10), ("v1-20260102", 12)):
        log = [{"step": step, "loss": 1.0} for step in range(first, 100, 10)]
        write_jsonl(tmp_path / folder / "logging.jsonl", log)
    assert len(load_run(tmp_path).store) == 9


def test_a_resume_overwrites_nothing_that_is_logged_over_samples() -> None:
    log = [{"step": step, "a_loss": 1.0, "a_tokens": 1.0} for step in (*range(1, 9), *range(5, 9))]
    log += [{"step": 8 * step, "lm loss vs samples": 2.0} for step in range(1, 9)]
    # Megatron writes both at once.
    log = [log[0], *log[12:], *log[1:12]]
    run = run_of(log, channels=["a"])
    assert run.resumes == (5,)
    assert len(run.series(GLOBAL, "lm loss vs samples")[0]) == 8
