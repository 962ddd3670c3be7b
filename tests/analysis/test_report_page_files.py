"""The report in a real browser: files of a chart, tables, phones, print."""

from __future__ import annotations

import base64
import csv
import io
import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from analysis.analysis_tools import HOSTILE, series_of
from analysis.browser import Report, needs_browser
from analysis.report_runs import rich_run

pytestmark = needs_browser

SVG = "{http://www.w3.org/2000/svg}"
SAVED = """
const [metric, format, done] = arguments;
const make = URL.createObjectURL;
let name = "";
HTMLAnchorElement.prototype.click = function () { name = this.download; };
URL.createObjectURL = (blob) => {
  const reader = new FileReader();
  reader.onload = () => done([name, blob.type, reader.result.split(",")[1]]);
  reader.readAsDataURL(blob);
  return make(blob);
};
document.querySelector(`[data-metric=${metric}] [data-save=${format}]`).click();
"""


def saved(report: Report, metric: str, format: str) -> tuple[str, str, bytes]:
    """(name, type, content) of the file that a button of a chart offers."""
    name, kind, text = report.driver.execute_async_script(SAVED, metric, format)
    return name, kind, base64.b64decode(text)


def test_a_chart_as_csv(report: Report, files: dict[str, Path]) -> None:
    report.open(files["rich"])
    report.choose("#smooth", "0")
    report.click('input[value="epoch"] + span')
    name, kind, content = saved(report, "loss", "csv")
    assert (name, kind) == ("loss.csv", "text/csv")
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    losses = {
        int(row["step"]): float(row["value"])
        for row in rows
        if (row["run"], row["channel"], row["split"]) == ("rich", "a", "train")
    }
    assert losses == pytest.approx(series_of(rich_run(), "a", "loss"), rel=1e-5)
    assert all(float(row["epoch"]) == pytest.approx(int(row["step"]) / 40) for row in rows)
    assert {row["split"] for row in rows} == {"train", "eval"}


def test_hostile_names_in_files_are_text(report: Report, files: dict[str, Path]) -> None:
    report.open(files["hostile"])
    content = saved(report, "loss", "csv")[2].decode()
    names = {row["channel"] for row in csv.DictReader(io.StringIO(content, newline=""))}
    assert HOSTILE in names
    assert not any(name.startswith(("=", "+", "-", "@")) for name in names)
    report.click("#legend-list button")
    tags = {element.tag for element in ET.fromstring(saved(report, "loss", "svg")[2]).iter()}
    assert not {f"{SVG}{tag}" for tag in ("script", "image", "a", "foreignObject")} & tags


def test_a_chart_as_svg_has_its_colors_in_itself(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"], theme="dark")
    name, kind, content = saved(report, "loss", "svg")
    assert (name, kind) == ("loss.svg", "image/svg+xml")
    root = ET.fromstring(content)
    lines = [e for e in root.iter(f"{SVG}path") if "line" in e.get("class", "").split()]
    colors = [line.get("stroke") for line in lines]
    assert "rgb(58, 128, 240)" in colors and not any("var(" in str(color) for color in colors)
    assert [line.get("d") for line in lines] == report.run(
        "return [...document.querySelectorAll('[data-metric=loss] path.line')]"
        ".map((path) => path.getAttribute('d'))"
    )
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"Loss (nats per token)", "step", "bbu"} <= set(texts)


def test_a_chart_as_png(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"])
    name, kind, content = saved(report, "share", "png")
    assert (name, kind) == ("share.png", "image/png")
    width, height = struct.unpack(">II", content[16:24])
    size = report.run(
        "const { width, height } = document.querySelector('[data-metric=share] .plot svg')"
        ".getBoundingClientRect(); return [width, height]"
    )
    assert width == pytest.approx(2 * size[0], abs=2) and height == 2 * (size[1] + 26)
    assert len(content) > 5000
    assert report.complaints() == []


def test_the_table_says_where_a_channel_is_missing(report: Report, files: dict[str, Path]) -> None:
    report.open(files["lacking"])
    widths = (
        "return new Set([...document.querySelectorAll(arguments[0])]"
        ".map((row) => row.cells.length)).size"
    )
    for table in ("#final", "#mix"):
        rows = report.texts(f"{table} tbody tr")
        assert len(rows) == 8
        (row,) = (row for row in rows if "missing" in row)
        assert row.startswith("lang_chat") and "other" in row
        assert report.run(widths, f"{table} tr") == 1
        report.click(f"{table} thead th:nth-child(4) button")
        assert "missing" in report.texts(f"{table} tbody tr")[-1]


def test_one_legend_says_what_lines_mean(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"])
    texts = report.texts("#dashes li")
    assert texts == [
        "whole run, as the trainer logged it",
        "evaluation",
        "step with an evaluation",
    ]
    report.open(files["rich"])
    assert report.texts("#runs .chip") == ["rich", "other"]
    texts = report.texts("#dashes li")
    assert texts[0] == "grey: the whole run, with the dash of its run"
    assert texts[-1] == "configured share"
    dash = "return getComputedStyle(document.querySelector(arguments[0])).strokeDasharray"
    for run in (0, 1):
        sample = report.run(dash, f"#runs .chip:nth-child({run + 1}) path")
        for channel in (-1, 0):
            line = f'[data-metric=loss] path.line.run{run}[data-channel="{channel}"]'
            assert report.run(dash, line) == sample


def test_on_a_phone_charts_come_before_the_list(report: Report, files: dict[str, Path]) -> None:
    top = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    report.open(files["four"], width=390)
    assert report.run(top, "#charts") < report.run(top, ".legend")


@pytest.mark.parametrize("width", [390, 768, 1440])
def test_no_tick_is_cut_off(report: Report, files: dict[str, Path], width: int) -> None:
    report.open(files["long"], width=width)
    for axis in ("steps", "tokens", "all_tokens"):
        report.click(f'input[value="{axis}"] + span')
        rooms = report.run(
            "return [...document.querySelectorAll('.axes text')].map((text) => {"
            "const box = text.getBoundingClientRect();"
            "const plot = text.closest('svg').getBoundingClientRect();"
            "return Math.min(box.left - plot.left, plot.right - box.right);"
            "})"
        )
        assert min(rooms) >= 0, axis


def test_small_curves_are_drawn_for_print(report: Report, files: dict[str, Path]) -> None:
    drawn = (
        "return [...document.querySelectorAll('[data-spark]')].map((cell) => cell.children.length)"
    )
    report.open(files["many"])
    assert 0 in report.run(drawn)
    report.driver.execute_cdp_cmd("Page.printToPDF", {"pageRanges": "1"})
    assert set(report.run(drawn)) == {1}
