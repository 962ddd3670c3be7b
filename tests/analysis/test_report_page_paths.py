"""The report in a real browser: a path has no more points than its pixels can show."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from analysis.analysis_tools import run_of
from analysis.browser import Report, needs_browser
from channel_metrics.analysis.report.html import write_report

pytestmark = needs_browser

NUM_STEPS = 2000
PEAK, DIP = (1501, 9.0), (1502, 0.25)
RAW = """
const svg = document.querySelector("[data-metric=loss] .plot svg");
const path = svg.querySelector('path.raw[data-channel="0"]').getAttribute("d");
const ticks = [...svg.querySelectorAll(".tick[text-anchor=end]")];
return [path, ticks.map((tick) => [Number(tick.textContent), Number(tick.getAttribute("y")) - 4])];
"""


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One channel of 2,000 noisy steps with one peak and one dip beside it."""
    rng = random.Random(4)
    history = [
        {"step": step, "a_loss": rng.uniform(1, 2), "a_tokens": 10}
        for step in range(1, NUM_STEPS + 1)
    ]
    for step, loss in (PEAK, DIP):
        history[step - 1]["a_loss"] = loss
    file = tmp_path_factory.mktemp("noisy") / "report.html"
    write_report([run_of(history)], file)
    return file


def drawn(report: Report) -> tuple[list[list[float]], Any]:
    """The points of the path in pixels, and a function from pixels to values."""
    path, ticks = report.run(RAW)
    points = [[float(end) for end in point.split()] for point in path[1:].split("L")]
    (low, bottom), (high, top) = ticks[0], ticks[-1]
    return points, lambda y: low + (bottom - y) / (bottom - top) * (high - low)


def test_points_in_one_column_are_two_and_no_peak_is_lost(report: Report, noisy: Path) -> None:
    report.open(noisy, width=390)
    points, value = drawn(report)
    columns = [int(x) for x, _ in points]
    width = columns[-1] - columns[0]
    assert width + 1 < len(points) <= 2 * (width + 1) < NUM_STEPS / 2
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    values = [value(y) for _, y in points]
    assert [max(values), min(values)] == pytest.approx([PEAK[1], DIP[1]], abs=0.05)


def test_points_outside_a_zoom_are_not_drawn(report: Report, noisy: Path) -> None:
    report.open(noisy, width=1440)
    report.go_to("zoom=1490..1510")
    points, value = drawn(report)
    assert len(points) == 23  # 21 inside, and one more on each side
    assert max(value(y) for _, y in points) == pytest.approx(PEAK[1], abs=0.05)
