"""Fixtures of the tests that watch a log, and of those that look at a report in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.analysis_tools import make_history, run_of
from analysis.browser import Report, start_browser
from analysis.labelled import AXES, PLAIN, history
from analysis.report_runs import FOUR, HOSTILE_NAMES, resumed_run, rich_run, run_with, troubled_run
from analysis.watch_tools import OPEN
from channel_metrics.analysis.report.html import write_report
from channel_metrics.analysis.watch import follow


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks that are told apart by time would make the tests slow."""
    monkeypatch.setattr(follow, "_SECONDS_BETWEEN_SEARCHES", -1.0)
    monkeypatch.setattr(follow, "_REST", 0.0)
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield Report(driver)
    driver.quit()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    runs = {
        "four": [run_with(FOUR)],
        "history": [run_of(make_history(40))],
        "long": [run_with(FOUR, steps=600)],
        "many": [run_with([f"dataset_{i:03d}" for i in range(200)], steps=24)],
        "hostile": [run_with(HOSTILE_NAMES)],
        "troubled": [troubled_run()],
        "two": [run_with(FOUR, name="base"), run_with(FOUR, name="other", seed=5)],
    }
    runs["three"] = [*runs["two"], run_with(FOUR[1:], name="third", seed=7)]
    runs["rich"] = [rich_run(), rich_run("other", seed=3)]
    runs["resumed"] = [resumed_run()]
    runs["lacking"] = [run_with(FOUR, name="base"), run_with(FOUR[:3], name="other", seed=5)]
    runs["axes"] = [
        run_of(history(PLAIN, axes=AXES)),
        run_of(history(PLAIN, steps=9), name="plain"),
    ]
    for name, what in runs.items():
        write_report(what, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in runs}
