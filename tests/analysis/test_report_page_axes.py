"""Labels of axes in the page: in place of the channels, for those who ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.analysis_tools import run_of, series_of
from analysis.browser import END, Report, needs_browser
from analysis.labelled import AXES, PLAIN, history
from analysis.report_page import page_of
from analysis.report_runs import run_with
from channel_metrics.analysis.axes import with_axis
from channel_metrics.analysis.report import page_data


def names_of(report: Report) -> list[str]:
    return sorted(report.texts("#legend-list bdi"))


@needs_browser
def test_labels_in_place_of_the_channels(report: Report, files: dict[str, Path]) -> None:
    report.open(files["axes"])
    assert names_of(report) == sorted(PLAIN)
    offered = "return [...document.querySelectorAll('#axis option')].map((o) => o.text)"
    assert report.run(offered) == ["channels", "domain", "lang"]
    axes = report.run("return JSON.parse(document.getElementById('data').textContent).label_axes")
    labels = [number for number, axis in enumerate(axes) if axis == "lang"]
    report.choose("#axis", "lang")
    assert names_of(report) == ["de", "en"]
    assert report.texts("#legend-count") == ["2 of 2 drawn"]
    # The whole of both runs, and the labels of the first run.
    assert report.lines() == [-1, -1, *labels] and len(labels) == 2
    losses = series_of(with_axis(run_of(history(PLAIN, axes=AXES)), "lang"), "de", "loss")
    said = report.read(END)
    assert f"{losses[12]:.3f}" in said and "bbu" not in said
    report.choose("#axis", "")
    assert names_of(report) == sorted(PLAIN)
    assert report.complaints() == []


@needs_browser
def test_the_address_holds_the_axis_and_a_channel_ends_it(
    report: Report, files: dict[str, Path]
) -> None:
    report.open(files["axes"])
    report.choose("#axis", "domain")
    view = report.run("return location.hash")
    assert "of=domain" in view
    report.open(files["axes"])
    report.go_to(view)
    assert "target" in names_of(report)
    assert report.run("return document.querySelector('#axis').value") == "domain"
    report.click("#final button[data-isolate]")
    assert names_of(report) == sorted(PLAIN)
    assert report.run("return document.querySelector('#axis').value") == ""
    assert report.texts("#legend-count") == ["1 isolated"]


def test_a_report_without_labels_has_no_choice_of_an_axis(tmp_path: Path) -> None:
    page = page_of([run_with(PLAIN)], tmp_path)
    assert ("select", "id", "axis") not in page.attributes
    assert page.data["label_axes"] == [""] * len(PLAIN)


def test_only_so_many_labels_of_an_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(history(PLAIN, axes=AXES))
    page = page_of([run], tmp_path)
    assert page.data["label_axes"].count("lang") == 2
    assert ("select", "id", "axis") in page.attributes
    monkeypatch.setattr(page_data, "_MAX_LABELS", 1)
    page = page_of([run], tmp_path)
    assert page.data["label_axes"].count("lang") == page.data["label_axes"].count("domain") == 1
    lang = with_axis(run, "lang")
    most = max(("de", "en"), key=lambda name: sum(series_of(lang, name, "tokens").values()))
    assert page.data["channels"][page.data["label_axes"].index("lang")] == most
