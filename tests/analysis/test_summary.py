"""Rows from a log history."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from rich.console import Console

from channel_metrics.analysis.summary import render, summarize

LOGS = [
    {"loss": 3.0, "bbu_loss": 4.0, "bbu_token_acc": 0.1, "bbu_tokens": 30, "bbu_samples": 3},
    {"loss": 2.0, "rru_loss": 2.0, "rru_tokens": 50, "rru_samples": 1, "unlabeled_tokens": 10},
    {"eval_loss": 1.0, "eval_bbu_loss": 0.5, "eval_rru_loss": 0.7, "eval_bbu_tokens": 999},
    {"loss": 1.0, "bbu_loss": 1.0, "bbu_token_acc": 0.9, "bbu_tokens": 10, "bbu_samples": 1},
    {"train_loss": 2.0, "train_runtime": 1.0},
]


def test_first_and_last_window_sums_and_shares() -> None:
    bbu, rru, unlabeled = summarize(LOGS, ["bbu", "rru", "never seen"])
    assert (bbu.first_loss, bbu.last_loss, bbu.change) == (4.0, 1.0, -0.75)
    assert (bbu.token_acc, bbu.eval_loss, bbu.tokens) == (0.9, 0.5, 40)
    assert (bbu.share, bbu.record_share) == (0.4, 0.8)
    assert (rru.first_loss, rru.last_loss, rru.token_acc, rru.eval_loss) == (2.0, 2.0, None, 0.7)
    assert (rru.share, rru.record_share) == (0.5, 0.2)
    assert (unlabeled.channel, unlabeled.tokens, unlabeled.share) == ("unlabeled", 10, 0.1)
    assert unlabeled.last_loss is None


def test_other_key_formats_and_sanitised_names() -> None:
    logs = [{"loss/b_u": 2.0, "eval_loss/b_u": 3.0}]
    (row,) = summarize(logs, ["b u"], "{metric}/{channel}")
    assert (row.channel, row.last_loss, row.eval_loss, row.tokens) == ("b u", 2.0, 3.0, None)


def test_nothing_logged() -> None:
    assert summarize([], ["bbu"]) == []


def test_table_shows_all_columns_and_no_ansi_in_a_plain_file() -> None:
    console = Console(width=160, force_terminal=False, record=True)
    rows = summarize(LOGS, ["bbu", "rru"])
    with console.capture() as capture:
        console.print(render(rows, 160, ratios={"bbu": 3, "rru": 1}, domains={"bbu": "target"}))
    text = capture.get()
    assert "\x1b" not in text
    line = next(line for line in text.splitlines() if " bbu " in line)
    cells = "bbu target 4.0000 1.0000 -75.0% 90.0% 0.5000 40 40.0% 80.0% 75.0%"
    assert line.split() == cells.split()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160])
def test_numbers_are_whole_however_narrow_the_terminal_is(width: int) -> None:
    console = Console(width=width, force_terminal=False)
    rows = summarize(LOGS, ["bbu", "rru"])
    with console.capture() as capture:
        console.print(render(rows, width, ratios={"bbu": 3, "rru": 1}, domains={"bbu": "target"}))
    text = capture.get()
    assert "…" not in text
    assert all(cell_len(line) <= width for line in text.splitlines())
    heads, bbu = [line for line in text.splitlines() if "last loss" in line or " bbu " in line]
    assert "1.0000" in bbu
    assert ("eval loss" in heads, "ratio" in heads) == (width >= 40, width >= 100)


def test_a_long_name_is_cut_before_a_number() -> None:
    rows = summarize([{"a" * 90 + "_loss": 1.5}], ["a" * 90])
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(render(rows, 80))
    assert "aaa…" in capture.get() and " 1.5000 " in capture.get()


def test_columns_without_a_value_are_hidden() -> None:
    rows = summarize([{"a_loss": 1.5}], ["a"])
    heads = [str(column.header) for column in render(rows, 160).columns]
    assert heads == ["channel", "first loss", "last loss", "change"]
