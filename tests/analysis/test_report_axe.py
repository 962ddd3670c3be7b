"""axe-core in the browser: no violation of any impact, whatever is drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.browser import HOME, Report, needs_browser

AXE = Path(sys.prefix) / "sources" / "axe_playwright_python" / "axe.min.js"

pytestmark = needs_browser


def violations(report: Report) -> list[Any]:
    """(rule, impact, first element) of each violation."""
    report.run(AXE.read_text(encoding="utf-8"))
    found: list[Any] = report.driver.execute_async_script(
        "const done = arguments[0]; axe.run().then((result) => done(result.violations.map("
        "(found) => [found.id, found.impact, found.nodes[0].html])))"
    )
    return found


@pytest.mark.parametrize("width", [1440, 768, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(report: Report, files: dict[str, Path], theme: str, width: int) -> None:
    for name in ("lacking", "three", "hostile", "troubled"):
        report.open(files[name], theme=theme, width=width)
        assert violations(report) == [], name


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_with_200_channels(
    report: Report, files: dict[str, Path], theme: str
) -> None:
    """All lines are drawn. Rows are alike, and axe looks at the colours of each for 10 ms."""
    report.open(files["many"], theme=theme)
    report.choose("#top", "all")
    assert len(report.lines()) == 201
    report.run(
        "for (const list of document.querySelectorAll('tbody, #legend-list')) {"
        "for (const row of [...list.children].slice(12)) row.remove(); }"
    )
    assert violations(report) == []


def test_axe_finds_nothing_in_a_page_that_is_used(report: Report, files: dict[str, Path]) -> None:
    report.open(files["rich"])
    report.click("#difference")
    report.choose("#other", "grad_norm")
    report.click("#legend-list button")
    report.read(HOME)
    assert violations(report) == []
    report.open(files["axes"])
    report.choose("#axis", "lang")
    assert violations(report) == []


def test_axe_would_find_two_landmarks_of_one_name(report: Report, files: dict[str, Path]) -> None:
    report.open(files["two"])
    report.run("document.querySelector('.scroll').setAttribute('role', 'region')")
    assert [found[:2] for found in violations(report)] == [["landmark-unique", "moderate"]]
