"""Labels of axes in the page: in place of the channels, for those who ask for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analysis.analysis_tools import run_of, series_of
from analysis.browser import END, Report, needs_browser
from analysis.labelled import AXES, PLAIN, history
from analysis.report_page import Page, page_of
from analysis.report_runs import run_with
from channel_metrics.analysis.axes import with_axis
from channel_metrics.analysis.report import groupings
from channel_metrics.analysis.report.html import write_report
from channel_metrics.analysis.rows import final_rows


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
def test_the_address_holds_the_axis_and_a_label_is_isolated(
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
    report.click("#final-1 button[data-isolate]")
    assert report.texts("#legend-count") == ["1 isolated"] and "target" in names_of(report)
    report.click("#show-all")
    report.choose("#axis", "")
    report.click("#final button[data-isolate]")
    assert report.texts("#legend-count") == ["1 isolated"] and names_of(report) == sorted(PLAIN)


@needs_browser
def test_texts_and_tables_follow_the_axis(report: Report, files: dict[str, Path]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    report.open(files["axes"])
    everywhere = ("#runs-title", "[data-axis] h2", "table.sortable tbody th", ".findings button")
    before = [report.texts(selector) for selector in everywhere]
    report.choose("#axis", "lang")
    assert report.texts("[data-axis] h2") == [
        "Runs of lang",
        "Labels of lang",
        "The mix of lang",
    ]
    assert report.texts(".sortable thead th:first-child") == ["lang", "lang"]
    # Only the first run has the axis.
    assert sorted(report.texts("#final-2 tbody th")) == ["de", "en"]
    assert report.texts("#final tbody th") == report.texts("#mix tbody th") == []
    report.click("#final-2 tbody th button")
    report.click("#show-all")
    drawn = "return document.querySelectorAll('#final-2 .spark path').length"
    assert WebDriverWait(report.driver, 5).until(lambda _: report.run(drawn) == 2)
    told = " ".join(report.texts(".findings p"))
    assert "de (" in told and "bbu" not in told and "self-check" not in told
    rows = {
        row.channel: row for row in final_rows(with_axis(run_of(history(PLAIN, axes=AXES)), "lang"))
    }
    search = (
        "const search = document.querySelector('#search'); search.value = arguments[0];"
        "search.dispatchEvent(new Event('input'))"
    )
    for name in ("de", "en"):
        report.run(search, name)
        assert f"{rows[name].last_loss:.4f}" in report.texts("#final-2 tbody td")
        assert report.texts("#final-2 tbody th") == [name]
    report.run(search, "")
    report.choose("#axis", "")
    assert [report.texts(selector) for selector in everywhere] == before
    assert report.complaints() == []


def test_tiles_and_findings_of_labels(tmp_path: Path) -> None:
    """A label rises while each channel falls."""
    log = [
        {"step": s, "loss": 3 - s / 40, "a_loss": 3 - s / 40, "a_tokens": 100}
        | {"lang/de_loss": 7 - s / 20 - s / 9, "lang/de_tokens": 50}
        | {"lang/en_loss": s / 9 - 1, "lang/en_tokens": 50}
        for s in range(1, 41)
    ]
    run = run_of(log)
    assert run.axes == ["lang"]
    file = tmp_path / "report.html"
    write_report([run], file)
    parts = file.read_text(encoding="utf-8").split("<div data-axis=")[1:]
    tiles, tiles_of_lang, found, found_of_lang, *_ = (
        " ".join(Page(f"<div data-axis={part}").text.split()) for part in parts
    )
    assert "To look at0" in tiles and "Highest" not in tiles
    assert "To look at1see findings" in tiles_of_lang and "Highest loss3.4444en" in tiles_of_lang
    assert "Lowest loss0.5556de" in tiles_of_lang
    assert "en: worse since step 2 (+4.22)" in found_of_lang and "worse since" not in found
    # Their buttons isolate these labels.
    data = Page("".join(parts)).data
    for part, labels in ((parts[1], ["en", "de"]), (parts[3], ["en"])):
        pressed = [int(number) for number in re.findall(r'data-isolate="(\d+)"', part)]
        assert [data["channels"][number] for number in pressed] == labels
        assert all(data["label_axes"][number] == "lang" for number in pressed)


def test_a_report_without_labels_has_no_choice_of_an_axis(tmp_path: Path) -> None:
    page = page_of([run_with(PLAIN)], tmp_path)
    assert ("select", "id", "axis") not in page.attributes
    assert page.data["label_axes"] == [""] * len(PLAIN)


def test_only_so_many_labels_of_an_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(history(PLAIN, axes=AXES))
    page = page_of([run], tmp_path)
    assert page.data["label_axes"].count("lang") == 2
    assert ("select", "id", "axis") in page.attributes
    monkeypatch.setattr(groupings, "_MAX_LABELS", 1)
    page = page_of([run], tmp_path)
    assert page.data["label_axes"].count("lang") == page.data["label_axes"].count("domain") == 1
    assert "1 label of lang with the fewest tokens is left out." in " ".join(page.text.split())
    # Each name has one number, in the table and in the data.
    names = page.data["channels"]
    assert sorted({row["channel"] for row in page.data["rows"]}) == [*range(len(names))]
    numbers = {int(value) for _, name, value in page.attributes if name == "data-channel"}
    assert numbers == {*range(len(names))}
    lang = with_axis(run, "lang")
    most = max(("de", "en"), key=lambda name: sum(series_of(lang, name, "tokens").values()))
    assert page.data["channels"][page.data["label_axes"].index("lang")] == most
