"""A report stays small: what is left out, and what is not; each run is judged once."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.analysis_tools import run_of
from analysis.report_page import Page, page_of
from analysis.report_runs import run_with, troubled_run
from channel_metrics.analysis.judging import trends
from channel_metrics.analysis.judging.trends import Trend
from channel_metrics.analysis.report import html, views
from channel_metrics.analysis.report.html import write_report
from channel_metrics.analysis.report.views import rank_channels
from channel_metrics.analysis.run import Run
from channel_metrics.errors import ChannelMetricsError


def test_a_page_too_large_loses_points_and_then_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with([f"channel {i}" for i in range(20)], steps=112)
    whole = write_report([run], tmp_path / "whole.html")
    assert whole.num_left_out == 0
    monkeypatch.setattr(html, "MAX_BYTES", whole.num_bytes * 2 // 3)
    thin = write_report([run], tmp_path / "thin.html")
    assert thin.num_left_out == 0 and thin.max_points < 112
    assert "has 112 points" in Page((tmp_path / "thin.html").read_text()).text
    monkeypatch.setattr(html, "MAX_BYTES", 100_000)
    small = write_report([run], tmp_path / "small.html")
    assert small.num_bytes < 100_000 and small.num_left_out > 0
    page = Page((tmp_path / "small.html").read_text())
    assert f"{small.num_left_out} channels with the fewest tokens are left out" in page.text
    ranked = rank_channels([run])
    assert page.data["channels"] == ranked[: small.num_channels]


def test_a_page_too_large_loses_labels_before_the_few_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more labels than fit, there is nothing left to take but labels."""
    names = [f"label_{place:02d}" for place in range(40)]
    log = [
        {"step": step, "loss": 1.0, "a_loss": 1.0, "a_tokens": 40}
        | {f"lang/{name}_loss": 1.0 for name in names}
        | {f"lang/{name}_tokens": 1 for name in names}
        for step in range(1, 20)
    ]
    run = run_of(log)
    whole = write_report([run], tmp_path / "whole.html")
    monkeypatch.setattr(html, "MAX_BYTES", whole.num_bytes * 3 // 4)
    small = write_report([run], tmp_path / "small.html")
    assert small.num_bytes < html.MAX_BYTES and small.num_left_out == 0
    page = Page((tmp_path / "small.html").read_text(encoding="utf-8"))
    kept = page.data["label_axes"].count("lang")
    assert 0 < kept < 40 and page.data["channels"][0] == "a"
    left_out = f"{40 - kept} labels of lang with the fewest tokens are left out"
    assert left_out in " ".join(page.text.split())
    # A page that cannot become smaller is written as it is.
    monkeypatch.setattr(html, "MAX_BYTES", 10)
    assert write_report([run], tmp_path / "least.html").num_channels == 0


def test_a_channel_that_is_left_out_keeps_its_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with([f"channel {i}" for i in range(8)])
    small = run_of(
        [
            {"step": s, "small_loss": 1 + s / 12, "small_tokens": 1, "big_loss": 3 - s / 12}
            | {"big_tokens": 100, "small_samples": 1, "big_samples": 1}
            for s in range(1, 13)
        ],
        name="rising",
        ratios={"small": 1, "big": 9},
    )
    monkeypatch.setattr(html, "_MAX_CHANNELS", 9)
    page = page_of([run, small], tmp_path)
    assert "small" not in page.data["channels"] and len(page.data["channels"]) == 9
    assert "small: worse since step 1 (+0.92), from 1.0833 to 2.0000" in page.text
    assert "small: 50.0% of the records, but configured as 10.0%" in page.text


def test_runs_are_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Run] = []

    def trends_of(run: Run) -> list[Trend]:
        judged.append(run)
        return trends.trends_of(run)

    monkeypatch.setattr(views, "trends_of", trends_of)
    run = run_with([f"channel {i}" for i in range(20)])
    whole = write_report([run], tmp_path / "whole.html")
    assert judged == [run]
    monkeypatch.setattr(html, "MAX_BYTES", whole.num_bytes // 2)
    assert write_report([run], tmp_path / "thin.html").num_left_out
    assert judged == [run, run]


def test_runs_that_are_missing_or_too_many(tmp_path: Path) -> None:
    for runs in ([], [troubled_run()] * 9):
        with pytest.raises(ChannelMetricsError, match=f"1 to 8 runs.*got {len(runs)}"):
            write_report(runs, tmp_path / "report.html")
