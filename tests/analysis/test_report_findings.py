"""Gaps are told by each channel's own rhythm; a window that lacks a loss is not checked."""

from __future__ import annotations

import math

import pytest

from analysis.analysis_tools import run_of
from channel_metrics.analysis.report.findings import find_gaps, self_check
from channel_metrics.analysis.run import Run


def with_gap(every: int, missing: int) -> Run:
    """`a` is always there; `b` in each `every`-th window, and once not for `missing` windows."""
    history: list[dict[str, float]] = []
    for step in range(1, 121):
        entry: dict[str, float] = {"step": step, "a_loss": 1.0, "a_tokens": 5.0}
        if step % every == 0 and not 60 < step <= 60 + missing:
            entry |= {"b_loss": 1.0, "b_tokens": 5.0}
        history.append(entry)
    return run_of(history)


@pytest.mark.parametrize(
    ("every", "missing", "is_gap"),
    [(1, 3, False), (1, 6, True), (4, 8, False), (4, 10, False), (4, 22, True), (10, 0, False)],
)
def test_a_gap_is_four_times_as_long_as_usual(every: int, missing: int, is_gap: bool) -> None:
    found = find_gaps(with_gap(every, missing))
    assert [gap.channel for gap in found] == ["b"] * is_gap


def test_two_windows_are_no_gap_of_a_channel_that_is_nearly_always_there() -> None:
    assert find_gaps(with_gap(1, 1)) == []


def test_a_window_with_tokens_that_have_no_loss_is_not_checked() -> None:
    """The trainer's loss has them, the channels do not."""
    whole = {"step": 1, "loss": 2.0, "a_loss": 2.0, "a_tokens": 9.0, "b_loss": 2.0, "b_tokens": 9.0}
    check = self_check(run_of([whole, whole | {"step": 2, "b_loss": math.nan, "loss": 5.0}]))
    assert check is not None
    assert (check.windows, check.largest) == (1, 0.0)
