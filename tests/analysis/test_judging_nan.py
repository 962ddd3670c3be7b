"""Losses that became NaN or infinite, and what the tables and the page show of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from analysis.analysis_tools import run_of, write_jsonl
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
from channel_metrics.analysis.judging.nonfinite import nonfinite_of
from channel_metrics.analysis.report.views import views_of
from channel_metrics.analysis.run import load_run


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
    assert math.isnan(shown["web"] or 0) and shown["code"] == 1.5
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
