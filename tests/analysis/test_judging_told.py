"""Runs that are compared, and what the commands say and return."""

from __future__ import annotations

import math
import random
import re
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.analysis_tools import Entry, make_history, run_of, write_jsonl
from analysis.judging_tools import (
    bad_in,
    between,
    found_in,
    nan_history,
    run_with_log,
    text_of,
    told_in,
    training,
)
from analysis.report_runs import run_with
from channel_metrics.analysis.judging.finding import lines_of, shortened
from channel_metrics.analysis.judging.versus import Versus, versus_of
from channel_metrics.analysis.report.views import views_of
from channel_metrics.analysis.run import Run, load_run
from channel_metrics.cli.main import app


def compared(seed: int, factor: float = 1.0, steps: int = 200, name: str = "first") -> Run:
    """A falls alike in all runs; B is higher by a factor. The noise is 5 %."""
    rng = random.Random(seed)
    history = []
    for step in range(1, steps + 1):
        entry: Entry = {"step": step}
        for channel, times in (("A", 1.0), ("B", factor)):
            loss = times * (1 + 2 * math.exp(-step / 50))
            entry |= {f"{channel}_loss": loss + rng.gauss(0, 0.05), f"{channel}_tokens": 100}
        history.append(entry)
    return run_of(history, name=name)


def versus(run: Run, first: Run) -> dict[str, Versus]:
    return {item.channel: item for item in versus_of(run, first)}


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_compared_by_means_with_an_interval(seed: int) -> None:
    found = versus(compared(seed, 1.18), compared(100 + seed))
    assert abs(found["A"].change) <= found["A"].limit < 0.05
    assert not found["A"].is_worse and found["A"].is_known
    assert abs(found["B"].change - 0.18) <= found["B"].limit < 0.05
    assert found["B"].is_worse


def test_worse_than_the_first_run_is_a_finding(tmp_path: Path) -> None:
    runs = [compared(1), compared(2, 1.18, name="second")]
    (line,) = bad_in(*runs)
    assert line.startswith("B: worse than in the first run (first) by 1")
    assert line.endswith("over the last third of their steps, to 200")
    assert "not worse than in first, because a rise by a twentieth is ruled out: A (" in told_in(
        *runs
    )
    assert bad_in(*runs[::-1]) == []
    page = text_of(runs, tmp_path)
    assert versus(runs[1], runs[0])["B"].interval in between(page, "vs first run", "</table>")


def test_a_run_that_became_nan_is_not_called_equal_to_the_first() -> None:
    first = run_of(training(200, {"web": lambda s: 2.2 - s / 200, "code": lambda s: 1.5 - s / 400}))
    text = told_in(first, run_of(nan_history()))
    assert "not worse than in run, because a rise by a twentieth is ruled out: code (" in text
    assert "web (" not in text and "whole run (" not in text


def test_runs_of_different_length_are_compared_over_their_common_steps() -> None:
    found = versus(compared(1, steps=100), compared(2))
    assert found["A"].last_step == 100 and abs(found["A"].change) <= found["A"].limit


def test_runs_that_are_too_short_to_compare_are_unknown() -> None:
    runs = [compared(1, steps=5), compared(2, 2.0)]
    assert "B (too few values)" in told_in(*runs)
    assert bad_in(*runs) == []


@pytest.mark.parametrize(
    ("off", "often", "verdict", "badge"),
    [
        (1.0, 1, "exact", "fine"),
        (1.02, 1, "close", "close"),
        (1.17, 20, "uneven", "unknown"),
        (1.17, 1, "differs", "differs"),
    ],
)
def test_the_badge_of_the_self_check(off: float, often: int, verdict: str, badge: str) -> None:
    history = make_history(60)
    for entry in history:
        if "bbu_loss" in entry and entry["step"] % often == 0:
            entry["loss"] *= off
    run = run_of(history)
    (view,) = views_of([run])
    (check,) = (finding for finding in found_in(run) if finding.kind == "check")
    assert (view.verdict, check.badge) == (verdict, badge)
    # "close" never stands beside a difference that is not.
    assert view.check is not None
    assert view.verdict != "close" or view.check.largest <= 0.05


def test_many_findings_of_a_kind_are_cut_and_counted() -> None:
    history = training(30, {f"c{i}": lambda s: 1 + s / 30 for i in range(25)})
    found = [finding for finding in found_in(run_with_log(history)) if finding.kind == "worse"]
    assert len(found) == 26  # The whole run is the last.
    few = [finding.line for finding in shortened(found)]
    assert len(few) == 21 and few[-1] == "and 6 more of the kind"
    assert lines_of(found)[0].startswith("! c")


def test_hostile_names_are_shown_in_the_terminal_as_text() -> None:
    run = run_with(["\u202eevil\x1b[31m", "line\nbreak"], steps=12)
    assert not set("\u202e\x1b") & set(told_in(run))
    assert len(told_in(run).splitlines()) == len(found_in(run))


def invoke(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout


LOGS = {
    "good": training(60, {"A": lambda s: 2 - s / 60}),
    "worse": training(60, {"A": lambda s: 2 - s / 60, "B": lambda s: 1 + abs(s - 20) / 60}),
    "nan": nan_history(),
    "few": training(3, {"A": lambda s: 1.0 + s}),
}


@pytest.mark.parametrize("command", ["analyze", "report"])
@pytest.mark.parametrize("name", LOGS)
def test_findings_are_printed_and_fail_on_worse_answers(
    command: str, name: str, tmp_path: Path
) -> None:
    log = write_jsonl(tmp_path / name / "logging.jsonl", LOGS[name])
    options = ["--no-pictures"] if command == "report" else []
    code, out = invoke(command, log.parent, *options)
    assert code == 0
    assert all(line in out.splitlines() for line in lines_of(found_in(load_run(log))))
    answer, same = invoke(command, log.parent, "--fail-on", "worse", *options)
    assert answer == (1 if name in ("worse", "nan") else 0)
    assert same == out
    if name == "worse":
        assert "! B: worse since step 20 (+0." in out
    if name == "nan" and command == "analyze":
        (row,) = (line.split() for line in out.splitlines() if line.strip().startswith("web  "))
        assert "nan" in row


def falling(factor: float, step: int) -> float:
    return factor * (2 - step / 60)


def test_a_run_worse_than_the_first_fails(tmp_path: Path) -> None:
    for name, factor in (("first", 1.0), ("second", 1.5)):
        history = training(60, {"A": partial(falling, factor)})
        write_jsonl(tmp_path / name / "logging.jsonl", history)
    paths = [tmp_path / "first", tmp_path / "second"]
    code, out = invoke("report", *paths, "--fail-on", "worse", "--no-pictures")
    (by,) = re.findall(r"! A: worse than in the first run \(first\) by (.*?)%", out)
    assert code == 1 and float(by) == pytest.approx(50, abs=2)
    assert invoke("report", *paths[::-1], "--fail-on", "worse", "--no-pictures")[0] == 0


def test_another_word_for_fail_on_is_refused(tmp_path: Path) -> None:
    assert invoke("report", tmp_path, "--fail-on", "better")[0] == 2
