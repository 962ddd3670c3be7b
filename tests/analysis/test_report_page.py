"""The report in a real browser: it draws what was logged, and asks nobody."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from analysis.analysis_tools import make_history, run_of, series_of
from analysis.browser import END, ESCAPE, HOME, RIGHT, Report, needs_browser
from analysis.report_runs import FOUR, HOSTILE_NAMES, run_with
from channel_metrics.analysis.judging.versus import versus_of
from channel_metrics.analysis.report.curves import charts
from channel_metrics.analysis.report.more_curves import MIX
from channel_metrics.analysis.report.views import rank_channels, shown

pytestmark = needs_browser


def test_it_draws_and_the_console_is_silent(report: Report, files: dict[str, Path]) -> None:
    for name, file in files.items():
        report.open(file)
        assert report.lines(), name
        assert report.complaints() == [], name
        assert report.requests() == [file.as_uri()], name
    report.open(files["four"])
    assert report.lines("loss") == [-1, 0, 1, 2, 3]
    assert report.lines("token_acc") == report.lines("share") == [0, 1, 2, 3]
    boxes = report.run(
        "return [...document.querySelectorAll('path.line[data-channel]')].map((path) => {"
        "const { x, y, width, height } = path.getBBox(), svg = path.ownerSVGElement;"
        "return [x, y, svg.clientWidth - x - width, svg.clientHeight - y - height]; })"
    )
    assert min(room for box in boxes for room in box) >= 0, "a line leaves its chart"
    assert sorted(report.texts("#legend-list bdi")) == sorted(FOUR)
    assert report.texts("figcaption h3") == [metric.label for metric in (*charts(), MIX)]


def test_nothing_leaves_the_page_even_if_a_script_tries(
    report: Report, files: dict[str, Path]
) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        report.open(files["four"])
        refused = report.driver.execute_async_script(
            """
            const [address, done] = arguments;
            const refused = [];
            document.addEventListener("securitypolicyviolation", (event) => {
              refused.push(event.effectiveDirective);
              if (refused.length === 6) done(refused.sort());
            });
            new Image().src = address + "image";
            fetch(address + "fetch").catch(() => 0);
            navigator.sendBeacon(address + "beacon");
            const link = document.createElement("link");
            Object.assign(link, { rel: "stylesheet", href: address + "style" });
            const script = document.createElement("script");
            script.src = address + "script";
            document.head.append(link, script);
            document.body.insertAdjacentHTML("beforeend", '<b onclick="window.hacked = 1"></b>');
            document.body.lastElementChild.click();
            """,
            f"http://127.0.0.1:{server.server_port}/",
        )
    finally:
        server.shutdown()
        server.server_close()
    elements = ["img-src", "script-src-attr", "script-src-elem", "style-src-elem"]
    assert refused == ["connect-src", "connect-src", *elements]
    assert asked == []
    assert report.run("return window.hacked") is None


def test_curves_are_read_aloud_as_they_were_logged(report: Report, files: dict[str, Path]) -> None:
    run = run_of(make_history(40))
    report.open(files["history"])
    for key, step in ((HOME, 1), (END, 40)):
        aloud = report.read(key)
        assert aloud.startswith(f"step {step},")
        for name in run.channels():
            values = series_of(run, name, "loss")
            if step in values:
                value = values[step]
                # The page has six digits, of which it says four.
                assert f"{name}: {value:.3f}"[:-1] in aloud
    assert report.read(RIGHT, "share").startswith("step 1,")
    assert report.read(RIGHT, "share").startswith("step 2,")


POINTS = """
const number = (element, name) => Number(element.getAttribute(name));
const chart = document.querySelector("[data-metric=loss]");
const ticks = (anchor) => [...chart.querySelectorAll(`.tick[text-anchor=${anchor}]`)];
const scale = (texts, name, pixel) => {
  const [a, b] = [texts[0], texts.at(-1)];
  const [low, high] = [Number(a.textContent), Number(b.textContent)];
  const part = (pixel - number(a, name)) / (number(b, name) - number(a, name));
  return low + part * (high - low);
};
// Ticks stand on whole pixels, a text 4 of them below its line.
const point = (x, y) => [scale(ticks("middle"), "x", x), scale(ticks("end"), "y", y + 4)];
const path = chart.querySelector(`path.line[data-channel="${arguments[0]}"]:not(.other)`);
const places = path.getAttribute("d").slice(1).split("L").map((place) => place.split(" "));
const drawn = places.map(([x, y]) => point(Number(x), Number(y)));
const dots = [...chart.querySelectorAll(".cursor circle")];
return [drawn, dots.map((dot) => point(number(dot, "cx"), number(dot, "cy")))];
"""


def test_lines_are_drawn_where_the_axes_say(report: Report, files: dict[str, Path]) -> None:
    run = run_with(FOUR)
    report.open(files["four"])
    report.read(END)
    for number, name in enumerate(rank_channels([run])):
        points, dots = report.run(POINTS, number)
        logged = series_of(run, name, "loss")
        # A pixel is about a hundredth of a nat, and a twentieth of a step.
        assert [x for x, _ in points] == pytest.approx(list(logged), abs=0.1)
        assert [y for _, y in points] == pytest.approx(list(logged.values()), abs=0.03)
        assert any(dot == pytest.approx([40, logged[40]], abs=0.1) for dot in dots), name


def test_over_own_tokens(report: Report, files: dict[str, Path]) -> None:
    run = run_with(FOUR)
    report.open(files["four"])
    report.click('input[value="tokens"] + span')
    assert report.lines() == [0, 1, 2, 3]
    totals = {name: int(sum(series_of(run, name, "tokens").values())) for name in FOUR}
    report.click("#legend-list button")
    assert report.texts('#legend-list button[aria-pressed="true"] bdi') == ["bbu"]
    aloud = report.read(END)
    assert aloud.startswith(f"{totals['bbu']:,} tokens, ") and ", bbu: " in aloud
    assert "supervised tokens of the channel itself" in report.texts(".axes .title")


def test_hostile_names_are_text(report: Report, files: dict[str, Path]) -> None:
    report.open(files["hostile"])
    report.run("document.querySelector('#top').value = 'all'")
    report.run("document.querySelector('#top').dispatchEvent(new Event('change'))")
    expected = sorted(shown(name) for name in HOSTILE_NAMES)
    for selector in ("#legend-list bdi", "#final tbody th", "#mix tbody th"):
        assert sorted(report.texts(selector)) == sorted(name.strip() for name in expected)
    aloud = report.read(END)
    for name in expected:
        assert name in aloud
    # Every name in the box at the cursor, and at the end of its line.
    for number in range(len(HOSTILE_NAMES)):
        report.run("document.querySelectorAll('#legend-list button')[arguments[0]].click()", number)
        report.run("for (const c of document.querySelectorAll('.plot')) c.focus()")
        report.keys(END)
        assert len(report.texts(".tip li")) >= 1
        name = report.texts('button.channel[aria-pressed="true"] bdi')[0]
        label = name if len(name) <= 15 else f"{name[:7]}…{name[-7:]}"
        assert label.strip() in report.texts("[data-metric=loss] .labels text")
        report.keys(ESCAPE)
    assert report.run("return window.hacked") is None
    assert report.run("return document.images.length + document.scripts.length") == 2
    assert report.run("return document.querySelectorAll('main script, main [onerror]').length") == 0
    assert report.run("return Object.prototype.toString.call({})") == "[object Object]"
    assert report.complaints() == []


def test_runs_are_compared(report: Report, files: dict[str, Path]) -> None:
    runs = [run_with(FOUR), run_with(FOUR, seed=5)]
    report.open(files["two"])
    assert len(report.lines()) == 10
    assert report.texts("#runs .chip") == ["base", "other"]
    report.click("#runs .chip", 1)
    assert len(report.lines()) == 5
    report.click("#runs .chip", 1)
    (found,) = (v for v in versus_of(runs[1], runs[0]) if (v.channel, v.split) == ("bbu", "train"))
    cells = report.texts("#final tbody tr:nth-child(2) td:last-child")
    assert cells == [found.interval.replace("-", "\N{MINUS SIGN}")]
    base, other = (list(series_of(run, "bbu", "loss").values())[-13:] for run in runs)
    assert found.change == pytest.approx(sum(other) / sum(base) - 1, abs=found.limit)
    report.click("#legend-list button")
    assert "bbu · base: " in (aloud := report.read(END)) and "bbu · other: " in aloud


def test_zoom_and_scales(report: Report, files: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains

    report.open(files["four"])
    ticks = "[data-metric=loss] .axes text[text-anchor=middle]"
    whole = report.texts(ticks)
    plot = report.driver.find_element("css selector", "[data-metric=loss] .plot")
    report.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    drag = ActionChains(report.driver, duration=50)
    drag.move_to_element(plot).click_and_hold().move_by_offset(120, 0).release().perform()
    assert report.texts(ticks) != whole
    assert len(report.texts("#reset-zoom")) == 1
    report.click("#reset-zoom")
    assert report.texts(ticks) == whole
    levels = "[data-metric=loss] .axes text[text-anchor=end].tick"
    assert report.texts(levels)[0] == "0"
    report.click("#log")
    assert "0" not in report.texts(levels) and "1" in report.texts(levels)
    report.click("#log")
    report.click("#zero")
    assert float(report.texts(levels)[0]) > 0


def test_long_runs_have_smooth_lines_over_their_points(
    report: Report, files: dict[str, Path]
) -> None:
    report.open(files["long"])
    raw = "return document.querySelectorAll('[data-metric=loss] path.raw').length"
    assert report.run(raw) == 5
    assert report.lines() == [-1, 0, 1, 2, 3]
    report.choose("#smooth", "0")
    assert report.run(raw) == 0
    assert report.lines() == [-1, 0, 1, 2, 3]
