"""Long names of channels and runs in the page: they can be told apart, and hide no column."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.analysis_tools import run_of
from analysis.browser import Report, needs_browser
from analysis.report_runs import FOUR, run_with
from channel_metrics.analysis.report.html import write_report

pytestmark = needs_browser
# They differ only at the end, as datasets in one folder do.
NAMES = [f"instruct_mixture_dialogue_long_{number:02d}" for number in range(40)]
RUNS = ("base", "more_code_lr3e-5", "third run, resumed")


def too_wide(report: Report, selector: str) -> int:
    """How many of these elements are wider than their place; there must be some."""
    found: list[bool] = report.run(
        "return [...document.querySelectorAll(arguments[0])]"
        ".map((e) => e.scrollWidth > e.clientWidth)",
        selector,
    )
    assert found
    return sum(found)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names") / "report.html"
    runs = [run_with(NAMES, steps=12, name=name, seed=seed) for seed, name in enumerate(RUNS)]
    write_report(runs, path)
    return path


def test_names_can_be_told_apart(report: Report, file: Path) -> None:
    report.open(file, width=1440)
    ends = report.texts("[data-metric=loss] .labels text")
    assert len(set(ends)) == len(ends) == 9
    assert all(end in ("whole run", f"instruc…long_{end[-2:]}") for end in ends)
    # The list shows them whole, in several lines.
    cut = (
        "return [...document.querySelectorAll('#legend-list bdi')]"
        ".filter((e) => e.scrollHeight > e.clientHeight || e.scrollWidth > e.clientWidth).length"
    )
    assert report.run(cut) == 0
    assert report.texts("#legend-list bdi")[0] in NAMES


def test_a_wide_page_shows_all_columns(report: Report, file: Path) -> None:
    report.open(file, width=1440)
    for cell in report.driver.find_elements("css selector", ".spark-cell")[:3]:
        report.run("arguments[0].scrollIntoView({ behavior: 'instant' })", cell)
    assert too_wide(report, ".scroll") == 0


@pytest.mark.parametrize("width", [390, 768])
def test_a_narrow_page_keeps_names_in_sight(report: Report, file: Path, width: int) -> None:
    report.open(file, width=width)
    assert report.run("return document.documentElement.scrollWidth") == width
    # The table is wider than the page, so a shadow tells of more columns.
    assert too_wide(report, ".scroll:has(#final)") == 1
    edge = report.run("return getComputedStyle(document.querySelector('.scroll')).background")
    assert edge.count("linear-gradient") == 2 and "local" in edge
    left = "return Math.round(document.querySelector('#final tbody th').getBoundingClientRect().x)"
    before = report.run(left)
    report.run("document.querySelector('.scroll:has(#final)').scrollLeft = 9999")
    assert report.run(left) == before
    # A run's name is not broken into letters.
    assert report.run("return document.querySelector('#final td.run').clientWidth") >= 100


def test_the_choice_of_theme_stays_in_one_line(report: Report, file: Path) -> None:
    report.open(file, width=768)
    places = "return [...document.querySelectorAll('.theme span')].map((e) => e.offsetTop)"
    assert len(set(report.run(places))) == 1


def test_a_line_that_becomes_nan_is_not_drawn_on(report: Report, tmp_path: Path) -> None:
    """A long dotted leader to its name looked like a flat curve."""
    history = [
        {"step": step, "loss": loss, "web_loss": loss, "web_tokens": 9, "b_loss": 1, "b_tokens": 9}
        for step in range(1, 201)
        for loss in [2.0 if step <= 100 else float("nan")]
    ]
    write_report([run_of(history)], tmp_path / "report.html")
    report.open(tmp_path / "report.html", width=1440)
    ends = report.run(
        "const box = document.querySelector('[data-metric=loss] .axes .base').getBBox();"
        "return [...document.querySelectorAll('[data-metric=loss] :is(.lead, .line:not(.raw))')]"
        ".map((e) => [e.getAttribute('class').split(' ')[0], e.getBBox()])"
        ".map(([kind, { x, width }]) => [kind, (x + width - box.x) / box.width])"
    )
    lines = sorted(round(end, 2) for kind, end in ends if kind == "line")
    assert lines == [0.5, 0.5, 1.0]
    leaders = sorted(end for kind, end in ends if kind == "lead")
    assert leaders == pytest.approx([0.5, 0.5, 1.0], abs=0.03)


def test_the_mix_of_short_names_fits_a_phone(report: Report, tmp_path: Path) -> None:
    write_report([run_with(FOUR)], tmp_path / "report.html")
    report.open(tmp_path / "report.html", width=390)
    assert too_wide(report, ".scroll:has(#mix)") == 0
