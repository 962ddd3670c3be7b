"""A metric that is registered is known to all that read logs; no other file has to name it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from schema_tools import EASY, registered
from typer.testing import CliRunner

from analysis.analysis_tools import Entry, make_history, run_of, write_jsonl
from analysis.browser import END, Report, needs_browser, start_browser
from channel_metrics.analysis.readers.keys import GLOBAL, Key, decode_keys
from channel_metrics.analysis.report.html import write_report
from channel_metrics.analysis.report.moving import MovingMeans
from channel_metrics.analysis.report.pictures import write_pictures
from channel_metrics.cli.main import app
from channel_metrics.core.schema import TOKENS, Metric
from channel_metrics.errors import ConfigError

USUAL = ["Loss (nats per token)", "Token accuracy", "Share of the tokens"]


@pytest.fixture
def easy_share() -> Iterator[None]:
    with registered(*EASY):
        yield


def history_with_easy_share() -> list[Entry]:
    history = make_history(40)
    for entry in history:
        if "bbu_tokens" in entry:
            entry["bbu_easy_share"] = 1 - math.exp(-entry["step"] / 20)
    return history


def page_of(history: list[Entry], folder: Path) -> tuple[list[str], Any]:
    """The titles of the charts, and the data of the page."""
    write_report([run_of(history)], folder / "report.html")
    text = (folder / "report.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert data
    return re.findall(r"<figcaption><h3>(.*?)</h3>", text), json.loads(data[1])


# Each of these needs to know the metric: its channel has no other, or a name of a trainer's, or
# the channel is what the key ends with.
KEYS = {
    ("z_loss", "z_easy_share"): Key("train", "z", "easy_share"),
    ("loss/bbu", "easy_share/bbu"): Key("train", "bbu", "easy_share"),
    ("bbu_loss", "bbu_easy_share", "bbu_easy_loss"): Key("train", "bbu", "easy_share"),
    ("eval_lm_loss", "eval_lm_easy_share"): Key("eval", "lm", "easy_share"),
}


@pytest.mark.parametrize(("keys", "meaning"), KEYS.items())
def test_its_key_is_known_from_when_it_is_registered(keys: tuple[str, ...], meaning: Key) -> None:
    assert decode_keys(keys)[keys[1]] != meaning
    with registered(*EASY):
        assert decode_keys(keys)[keys[1]] == meaning
    assert decode_keys(keys)[keys[1]] != meaning


def test_a_metric_that_needs_the_nll_is_no_evidence_of_a_channel() -> None:
    keys = ["aux_loss", "aux_bits", "bbu_loss", "bbu_tokens"]
    with registered(Metric("bits", ("nll",), lambda sums: sums["nll"])):
        assert decode_keys(keys)["aux_bits"].channel == GLOBAL
    with registered(Metric("bits", ("samples",), lambda sums: sums["samples"])):
        assert decode_keys(keys)["aux_bits"].channel == "aux"


@pytest.mark.usefixtures("easy_share")
def test_analyze_writes_it(tmp_path: Path) -> None:
    history = history_with_easy_share()
    log = write_jsonl(tmp_path / "run" / "logging.jsonl", history)
    result = CliRunner().invoke(app, ["analyze", str(log), "--csv"])
    assert result.exit_code == 0, result.output
    with (tmp_path / "run" / "channel_analysis" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "easy_share"]
    assert {(row["split"], row["channel"]) for row in rows} == {("train", "bbu")}
    expected = {e["step"]: e["bbu_easy_share"] for e in history if "bbu_easy_share" in e}
    assert {int(row["step"]): float(row["value"]) for row in rows} == expected


@pytest.mark.usefixtures("easy_share")
def test_it_has_a_chart_in_the_report_and_a_picture(tmp_path: Path) -> None:
    history = history_with_easy_share()
    titles, data = page_of(history, tmp_path)
    assert titles == [*USUAL, "Easy tokens"]
    (curve,) = (c for c in data["curves"] if c["metric"] == "easy_share")
    assert data["channels"][curve["channel"]] == "bbu"
    assert curve["values"] == pytest.approx(
        [e["bbu_easy_share"] for e in history if "bbu_easy_share" in e], rel=1e-5
    )
    names = {path.name for path in write_pictures([run_of(history)], tmp_path / "pictures")}
    assert {"easy_share.png", "easy_share.svg"} <= names


def test_without_a_label_or_without_values_there_is_no_chart(tmp_path: Path) -> None:
    assert page_of(history_with_easy_share(), tmp_path)[0] == USUAL
    with registered(*EASY):
        assert page_of(make_history(40), tmp_path)[0] == USUAL


def test_a_smooth_count_is_a_plain_mean_of_windows() -> None:
    history = [{"step": s, "a_loss": 1.0, "a_tokens": s, "a_hits": s} for s in range(1, 121)]
    hits = Metric("hits", ("tokens",), lambda s: s["tokens"], label="Hits", adds_up=True)
    with registered(hits):
        steps, means = MovingMeans(run_of(history), []).of("a", "hits")
    # A window is the step and the one on either side.
    assert means[1:-1].tolist() == pytest.approx(steps[1:-1].tolist(), rel=1e-12)


@pytest.fixture
def titles(tmp_path: Path, easy_share: None) -> list[str]:
    """Those of a page, `report.html`, with a chart that has no place of its own."""
    margin = Metric("margin", ("tokens",), lambda s: None, unit="nats", label="Margin <b>(</b>")
    history = history_with_easy_share()
    for entry in history:
        if "rru_tokens" in entry:
            entry["rru_margin"] = -entry["step"] / 10
    with registered(margin):
        found, _ = page_of(history, tmp_path)
    return found


def test_any_number_of_charts_has_titles(titles: list[str]) -> None:
    assert titles[3:] == ["Easy tokens", "Margin &lt;b&gt;(&lt;/b&gt;"]


@needs_browser
@pytest.mark.usefixtures("titles")
def test_the_page_draws_and_reads_any_number_of_charts(tmp_path: Path) -> None:
    driver = start_browser(tmp_path / "profile")
    try:
        report = Report(driver)
        report.open(tmp_path / "report.html")
        assert report.complaints() == []
        assert report.texts("figcaption h3")[3:] == ["Easy tokens", "Margin <b>(</b>"]
        assert len(report.lines("easy_share")) == len(report.lines("margin")) == 1
        assert report.read(END, "easy_share").endswith("bbu: 86.5%")
        assert "rru: -" in report.read(END, "margin")
        widths = "return [...document.querySelectorAll('.chart')].map((e) => e.clientWidth)"
        first, *others = report.run(widths)
        assert all(width < 0.6 * first for width in others), "four charts in two rows"
    finally:
        driver.quit()


def test_nothing_is_left_behind() -> None:
    before = TOKENS.column_names, TOKENS.metric_names
    with registered(*EASY):
        assert (TOKENS.column_names, TOKENS.metric_names) != before
    # The column is there, but what comes after it cannot be registered.
    with pytest.raises(ConfigError, match="registered already"), registered(EASY[0], EASY[0]):
        pass
    assert (TOKENS.column_names, TOKENS.metric_names) == before
