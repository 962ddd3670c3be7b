"""Runs that became NaN, runs that are compared, and what the commands say and return."""

from __future__ import annotations

import json
import math
import random
import re
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.analysis_tools import Entry, make_history, run_of, write_jsonl
from analysis.judging_tools import bad_in, found_in, run_with_log, told_in, training
from analysis.report_runs import run_with
from channel_metrics.analysis.judging.finding import lines_of, shortened
from channel_metrics.analysis.judging.nonfinite import nonfinite_of
from channel_metrics.analysis.judging.versus import Versus, versus_of
from channel_metrics.analysis.report.html import write_report
from channel_metrics.analysis.report.views import views_of
from channel_metrics.analysis.run import Run, load_run
from channel_metrics.cli.main import app


def nan_history(web_from: int = 101) -> list[Entry]:
    """200 steps; the loss of the whole run is NaN from 101 on, that of web from another step."""
    history = training(200, {"web": lambda s: 2.2 - s / 200, "code": lambda s: 1.5 - s / 400})
    for entry in history:
        if entry["step"] >= web_from:
            entry["web_loss"] = math.nan
        if entry["step"] > 100:
            entry["loss"] = math.nan
    return history


def text_of(runs: list[Run], folder: Path) -> str:
    write_report(runs, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def between(text: str, begin: str, end: str) -> str:
    return text.split(begin, 1)[1].split(end, 1)[0]


def test_a_run_that_became_nan(tmp_path: Path) -> None:
    history = nan_history()
    run = load_run(write_jsonl(tmp_path / "logging.jsonl", history))
    web, whole = bad_in(run)[:2]
    assert web == (
        f"web: NaN since step 101; the last number was {history[99]['web_loss']:.4f} at step 100"
    )
    assert whole == (
        f"the whole run: NaN since step 101; the last number was {history[99]['loss']:.4f} at step "
        "100; first in web, at step 101"
    )
    fine = [finding.line for finding in found_in(run) if finding.level == "good"]
    assert not any("web" in line or "whole" in line for line in fine)


def test_the_first_tile_says_nan(tmp_path: Path) -> None:
    history = nan_history()
    page = text_of([run_of(history)], tmp_path)
    tile = between(page, 'aria-label="At a glance">', "</li>")
    assert 'class="label">Loss of the whole run<' in tile and 'class="big">NaN<' in tile
    assert f"since step 101; {history[99]['loss']:.4f} at step 100" in tile
    row = between(page, '<tr data-channel="0">', "</tr>")
    assert 'data-value="">NaN</td>' in row and "web" in row
    assert page.count('data-kind="nan"') == 2


def test_the_channel_that_was_nan_first() -> None:
    run = run_of(nan_history(web_from=90))
    assert [(item.channel, item.first_step) for item in nonfinite_of(run)] == [
        ("web", 90),
        ("", 101),
    ]
    assert bad_in(run)[1].endswith("first in web, at step 90")


def test_a_channel_without_a_finite_token_has_no_loss_in_the_log() -> None:
    # As this library logs it: the loss is absent, and the tokens are counted.
    history = nan_history(web_from=90)
    for entry in history:
        if math.isnan(entry["web_loss"]):
            del entry["web_loss"]
            entry["web_nonfinite"] = 100
    assert bad_in(run_of(history))[0].startswith("web: NaN since step 90; the last number was")


@pytest.mark.parametrize("text", ["NaN", "Infinity"])
def test_a_loss_that_json_lacks_is_read_from_a_text(tmp_path: Path, text: str) -> None:
    history = nan_history()
    for entry in history:
        entry |= {key: text for key, value in entry.items() if math.isnan(value)}
    run = load_run(write_jsonl(tmp_path / "logging.jsonl", history))
    word = "NaN" if text == "NaN" else "infinite"
    assert [line.split(";")[0] for line in bad_in(run)[:2]] == [
        f"web: {word} since step 101",
        f"the whole run: {word} since step 101",
    ]


def test_losses_that_are_null_are_counted(tmp_path: Path) -> None:
    """Null may also mean that there is no value, as in a table that was written as JSON."""
    entries = [
        {"step": step, "loss": 1.0 if step <= 3 else None, "note": None} for step in range(1, 9)
    ]
    said = "5 losses are null in the log, which may mean NaN or no value; they are left out"
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    for path in (write_jsonl(tmp_path / "a.jsonl", entries), tmp_path / "trainer_state.json"):
        assert load_run(path).problems.notes == [said]


@pytest.mark.parametrize("is_logged", [True, False])
def test_an_evaluation_that_became_nan_shows_no_last_number(
    tmp_path: Path, is_logged: bool
) -> None:
    """It is logged as NaN, or absent with the count of its tokens, as this library does it."""
    lost = {"eval_web_loss": math.nan} if is_logged else {"eval_web_nonfinite": 7}
    history = run_with_log(
        training(40, {"web": lambda s: 2 - s / 40, "code": lambda s: 1.0}),
        [{"step": 20, "eval_web_loss": 1.25, "eval_code_loss": 1.5}],
        [{"step": 40, "eval_code_loss": 1.5} | lost],
    )
    (view,) = views_of([history])
    shown = {row.row.channel: row.row.eval_loss for row in view.rows}
    assert math.isnan(shown["web"]) and shown["code"] == 1.5
    page = text_of([history], tmp_path)
    row = next(part for part in page.split("<tr data-channel=")[1:] if "web</" in part)
    assert row.split("</tr>")[0].count(">NaN</td>") == 1 and "1.2500" not in row.split("</tr>")[0]


def test_one_nan_that_passes_is_told_with_its_step() -> None:
    history = training(200, {"web": lambda s: 2.2 - s / 200})
    history[49]["web_loss"] = math.nan
    run = run_of(history)
    assert bad_in(run) == ["web: NaN in 1 value, first at step 50"]
    assert "not worse, because it is at its lowest" in told_in(run)


def test_a_gradient_that_stays_nan_is_told_where_the_loss_hides_it() -> None:
    history = training(200, {"web": lambda s: 2.2 - s / 200})
    for entry in history:
        entry["grad_norm"] = math.nan if entry["step"] > 100 else 1.0
    assert bad_in(run_of(history))[0].startswith("the gradient norm: NaN since step 101")


def test_an_infinite_loss_is_called_so() -> None:
    history = [
        {"step": s, "a_loss": math.inf if s > 7 else 1.0, "a_tokens": 1} for s in range(1, 9)
    ]
    assert bad_in(run_of(history)) == [
        "a: infinite since step 8; the last number was 1.0000 at step 7"
    ]


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
