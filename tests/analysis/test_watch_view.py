"""What is kept of a log while it is watched, and how it is shown."""

from __future__ import annotations

import math
import random
import re

import pytest

from analysis.report_runs import HOSTILE_NAMES
from analysis.watch_tools import printed, shares
from channel_metrics.analysis.watch.screen import line_of, sparkline, view_of
from channel_metrics.analysis.watch.traces import Trace, traces_of

# What a terminal would obey.
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def test_a_trace_is_bounded_and_exact() -> None:
    rng, trace = random.Random(0), Trace()
    values = [rng.random() for _ in range(5000)]
    for step, value in enumerate(values):
        assert trace.add(step, rng.random())
        assert trace.add(step, value), "the last value of a step counts"
    assert (trace.first, trace.last, trace.step) == (values[0], values[-1], 4999)
    assert trace.total == pytest.approx(math.fsum(values))
    size = 32
    parts = [values[i : i + size] for i in range(0, 5000, size)]
    assert trace.curve == pytest.approx([sum(part) / len(part) for part in parts])
    assert not trace.add(4998, 1.0)


def test_values_that_are_not_finite() -> None:
    trace = Trace()
    for step, value in ((1, math.nan), (2, 3.0), (3, math.inf), (3, 2.0), (4, 5.0), (4, math.nan)):
        assert trace.add(step, value)
    assert trace.first == 3.0 and math.isnan(trace.last or 0.0)
    assert (trace.total, trace.count, trace.curve) == (5.0, 2, [3.0, 2.0])
    view = view_of({"a_loss": trace, "a_tokens": Trace()})
    assert view.rows[0].change is None
    assert "a nan" in line_of(view)


def test_a_channel_without_a_finite_token_is_nan() -> None:
    """Its loss is absent then, and the log counts the tokens."""
    readings = [(step, f"{name}_loss", 1.5) for step in (1, 2) for name in ("a", "b", "c")]
    readings += [(2, "c_nonfinite", 1.0), (3, "a_nonfinite", 7.0), (3, "b_loss", 1.25)]
    readings += [(step, f"{name}_tokens", 9.0) for step in (1, 2, 3) for name in ("a", "b")]
    rows = {row.name: row for row in view_of(traces_of(readings)).rows}
    assert math.isnan(rows["a"].loss or 0.0) and (rows["a"].step, rows["a"].change) == (3, None)
    assert (rows["b"].loss, rows["c"].loss, rows["c"].step) == (1.25, 1.5, 2)
    assert "a nan" in line_of(view_of(traces_of(readings)))


def test_sparklines() -> None:
    assert sparkline([], width=5) == ""
    assert sparkline([2.0, 2.0], width=5) == "▁▁"
    assert sparkline([0.0, 7.0, 3.0], width=5) == "▁█▄"
    assert sparkline([0, 0, 4, 4, 8, 8], width=3) == "▁▅█"
    assert len(sparkline(range(1000), width=24)) == 24


def test_orders() -> None:
    traces = shares({"b": 10, "unlabeled": 99, "c": 30, "a": 20})
    orders = {
        order: "".join(r.name[0] for r in view_of(traces, order=order).rows)
        for order in ("share", "loss", "change", "name", "log")
    }
    assert orders == {
        "share": "cabu",
        "loss": "bcau",
        "change": "bcau",
        "name": "abcu",
        "log": "bcau",
    }
    found = {row.name: row.share for row in view_of(traces).rows}
    assert found == pytest.approx(
        {"c": 30 / 159, "a": 20 / 159, "b": 10 / 159, "unlabeled": 99 / 159}
    )


def test_more_channels_than_rows() -> None:
    view = view_of(shares({f"c{i:03d}": i + 1 for i in range(200)}))
    table = printed(view, max_rows=3)
    assert re.findall(r"c\d{3}", table) == ["c199", "c198", "c197"]
    assert "and 197 more" in table
    assert line_of(view, 2).endswith("c199 -36.0000  c198 -35.8000  and 198 more")
    assert "more" not in printed(view)


@pytest.mark.parametrize(
    "name",
    [*HOSTILE_NAMES, "\x1b[2J\x1b]0;title\x07", "[bold red]x[/]", "\x9b31mred", "a\rb", "[/]"],
)
def test_hostile_names_are_text(name: str) -> None:
    view = view_of(shares({name: 1, "b": 2}))
    for text in (printed(view), line_of(view)):
        assert not CONTROLS.search(text)
        text.encode()
    table = printed(view).splitlines()
    assert len(table) == len(printed(view_of(shares({"a": 1, "b": 2}))).splitlines())
    if name.startswith("["):
        assert name in printed(view) and name in line_of(view)


def test_channels_that_are_only_evaluated_have_rows_of_their_evaluations() -> None:
    readings = [(1, "loss", 2.5), (1, "a_loss", 2.0), (1, "a_tokens", 3.0)]
    readings += [(2, "eval_b_loss", 1.5), (4, "eval_b_loss", 1.25), (4, "eval_b_runtime", 0.5)]
    text = printed(view_of(traces_of(readings)))
    (line,) = (line for line in text.splitlines() if "b (eval)" in line)
    assert line.split()[2:4] == ["1.2500", "-16.7%"]
    only = view_of(traces_of([reading for reading in readings if not reading[1].startswith("a_")]))
    assert (only.split, only.whole.loss) == ("eval", 2.5)
    assert [(row.name, row.loss) for row in only.rows] == [("b", 1.25)]


def test_a_loss_of_zero_has_fallen_by_all_of_it() -> None:
    traces = traces_of([(1, "a_loss", 2.0), (2, "a_loss", 0.0), (2, "a_tokens", 1.0)])
    assert view_of(traces).rows[0].change == -1.0
