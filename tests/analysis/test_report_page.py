"""The report in a real browser: it draws, answers to mouse and keyboard, and asks nobody."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from analysis_tools import make_history, run_of, series_of
from browser import Report, start_browser
from report_runs import HOSTILE_NAMES, run_with, troubled_run

from channel_metrics.analysis.report.curves import charts
from channel_metrics.analysis.report.html import write_report
from channel_metrics.analysis.report.views import rank_channels, shown

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="Selenium is in the main environment only (make test, Python 3.11)",
)

FOUR = ("bbu", "rru", "lvis", "lang_chat")
ENTER, ESCAPE, DOWN, END, HOME = "\ue007", "\ue00c", "\ue015", "\ue010", "\ue011"
RIGHT, TAB = "\ue014", "\ue004"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield Report(driver)
    driver.quit()


@pytest.fixture(scope="module")
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
    for name, what in runs.items():
        write_report(what, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in runs}


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
    assert report.texts("figcaption h3") == [metric.label for metric in charts()]


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


def test_a_click_in_the_legend_isolates(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"])
    names = report.texts("#legend-list bdi")
    colors = "return [...document.querySelectorAll('#legend-list .swatch')].map((e) => e.className)"
    before = report.run(colors)
    for number in (1, 2):
        report.click("#legend-list button", number)
        assert report.lines() == [-1, number]
        assert report.lines("share") == [number]
        assert report.texts('button.channel[aria-pressed="true"] bdi') == [names[number]]
        assert report.texts("#legend-count") == ["1 isolated"]
    report.click("#legend-list button", 2)
    assert report.lines() == [-1, 0, 1, 2, 3]
    assert report.run(colors) == before
    report.click("#legend-list button", 3)
    report.click("#show-all")
    assert report.lines() == [-1, 0, 1, 2, 3]
    report.click("#legend-list input", 0)
    assert report.lines() == [-1, 1, 2, 3]


def test_a_name_that_is_pointed_at_stands_out(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"])
    lit = (
        "return [...document.querySelectorAll('[data-metric=loss] path.line.lit:not(.other)')]"
        ".map((e) => e.dataset.channel)"
    )
    report.keys("/")
    assert report.run(lit) == []
    report.keys(DOWN)
    report.keys(DOWN)
    assert report.run(lit) == ["1"]
    fading = "return document.querySelectorAll('.fading').length"
    assert report.run(fading) == 1
    report.keys("/")
    assert report.run(lit) == [] and report.run(fading) == 0
    report.click("#legend-list button", 2)
    assert report.lines() == [-1, 2] and report.run(fading) == 0


def test_the_keyboard_is_enough(report: Report, files: dict[str, Path]) -> None:
    report.open(files["many"])
    report.keys("/")
    report.keys("_01", DOWN)
    focused = "return document.activeElement.textContent"
    assert "dataset_01" in report.run(focused)
    report.keys(ENTER)
    assert len(report.lines()) == 2
    report.keys(ESCAPE)
    assert len(report.lines()) == 9
    # The whole list is one stop of the tab key, from which one comes to the chart.
    report.keys(TAB)
    assert report.run("return document.activeElement.className") == "plot"
    assert (
        report.run("return document.querySelectorAll('#legend-list [tabindex=\"0\"]').length") == 1
    )
    report.open(files["four"])
    report.keys("/")
    report.keys(DOWN, DOWN)
    report.keys(DOWN)
    drawn = report.lines()
    report.keys(" ")
    assert len(report.lines()) == len(drawn) - 1
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert report.run(outline) == "solid"


def test_search_filters_legend_and_tables_and_enter_draws(
    report: Report, files: dict[str, Path]
) -> None:
    report.open(files["many"])
    report.click("#search")
    report.keys("DATASET_19")
    found = [f"dataset_{i}" for i in range(190, 200)]
    assert sorted(report.texts("#legend-list bdi")) == found
    assert sorted(report.texts("#final tbody th")) == found
    assert sorted(report.texts("#mix tbody th")) == found
    assert report.texts("#legend-count") == ["10 of 200 found, 8 of 200 drawn"]
    report.keys(ENTER)
    assert len(report.lines()) == 11
    report.keys("9 no such name")
    assert report.texts("#legend-list bdi") == []
    assert report.texts("#legend-none") == ["No channel has this in its name."]


def test_two_hundred_channels(report: Report, files: dict[str, Path]) -> None:
    assert files["many"].stat().st_size < 6_000_000
    report.open(files["many"])
    assert len(report.texts("#legend-list bdi")) == 200
    assert report.lines() == [-1, *range(8)]
    swatches = "#legend-list li:not(.dim) .swatch"
    colors = "return [...document.querySelectorAll(arguments[0])].map((e) => e.className)"
    assert len(set(report.run(colors, swatches))) == 8
    report.run("document.querySelector('#order').value = 'loss'")
    report.run("document.querySelector('#order').dispatchEvent(new Event('change'))")
    losses = [float(text) for text in report.texts("#legend-list .value")]
    assert losses == sorted(losses, reverse=True)
    report.run("document.querySelector('#top').value = 'all'")
    report.run("document.querySelector('#top').dispatchEvent(new Event('change'))")
    assert report.lines() == [-1, *range(200)]
    assert report.complaints() == []


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
        label = name if len(name) <= 15 else name[:14] + "…"
        assert label.strip() in report.texts("[data-metric=loss] .labels text")
        report.keys(ESCAPE)
    assert report.run("return window.hacked") is None
    assert report.run("return document.images.length + document.scripts.length") == 2
    assert report.run("return document.querySelectorAll('main script, main [onerror]').length") == 0
    assert report.run("return Object.prototype.toString.call({})") == "[object Object]"
    assert report.complaints() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes(report: Report, files: dict[str, Path], theme: str) -> None:
    report.open(files["four"], theme=theme)
    grounds = {"light": "rgb(247, 247, 244)", "dark": "rgb(16, 18, 20)"}
    ground = "return getComputedStyle(document.documentElement).backgroundColor"
    other = "dark" if theme == "light" else "light"
    assert report.run(ground) == grounds[theme]
    report.click(f'input[name="theme"][value="{other}"] + span')
    assert report.run(ground) == grounds[other]
    report.driver.refresh()
    assert report.run(ground) == grounds[other]
    report.click('input[name="theme"][value="auto"] + span')
    assert report.run(ground) == grounds[theme]


CONTRASTS = """
const probe = document.body.appendChild(document.createElement("i"));
const color = (name) => {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((part) => {
    const p = part / 255;
    return p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4;
  });
};
const light = (name) => {
  const [r, g, b] = color(name);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
return arguments[0].map(([ink, ground]) => {
  const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
});
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(report: Report, files: dict[str, Path], theme: str) -> None:
    report.open(files["four"], theme=theme)
    pairs = [(ink, ground) for ink in ("ink", "soft", "accent") for ground in ("page", "card")]
    pairs += [("ink", "wash"), ("soft", "wash"), ("alarm", "alarm-wash"), ("calm", "calm-wash")]
    pairs += [("alarm", "card")]
    for pair, contrast in zip(pairs, report.run(CONTRASTS, pairs), strict=True):
        assert contrast >= 4.5, pair


def test_what_can_be_used_has_a_name_for_screen_readers(
    report: Report, files: dict[str, Path]
) -> None:
    report.open(files["two"])
    nodes = report.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "checkbox", "radio", "combobox", "searchbox", "table", "group", "region"}
    found = set()
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in roles and not node.get("ignored"):
            found.add(role)
            assert node["name"].get("value", "").strip(), node
    assert found == roles


@pytest.mark.parametrize("width", [360, 768])
def test_narrow_pages_do_not_scroll_sideways(
    report: Report, files: dict[str, Path], width: int
) -> None:
    for name in ("hostile", "two", "troubled"):
        report.open(files[name], width=width)
        assert report.run("return document.documentElement.scrollWidth") <= width, name


def test_charts_follow_the_window(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"])
    size = {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    report.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    width = report.driver.execute_async_script(
        "const done = arguments[0], width = () => document.querySelector('.plot svg').clientWidth;"
        "const look = (left) => width() < 700 || !left ? done(width())"
        ": requestAnimationFrame(() => look(left - 1)); look(300);"
    )
    assert 500 < width < 700


def test_runs_are_compared(report: Report, files: dict[str, Path]) -> None:
    runs = [run_with(FOUR), run_with(FOUR, seed=5)]
    report.open(files["two"])
    assert len(report.lines()) == 10
    assert report.texts("#runs .chip") == ["base", "other"]
    report.click("#runs .chip", 1)
    assert len(report.lines()) == 5
    report.click("#runs .chip", 1)
    base, other = (list(series_of(run, "bbu", "loss").values())[-1] for run in runs)
    cells = report.texts("#final tbody tr:nth-child(2) td:last-child")
    assert cells == [f"{other / base - 1:+.1%}".replace("-", "\N{MINUS SIGN}")]
    report.click("#legend-list button")
    assert "bbu · base: " in (aloud := report.read(END)) and "bbu · other: " in aloud


def test_tables_are_sorted(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"])
    column = "#final tbody td:nth-child(4)"
    for order in ("descending", "ascending"):
        report.click("#final thead th:nth-child(4) button")
        values = [float(text) for text in report.texts(column)]
        assert values == sorted(values, reverse=order == "descending")
        assert len(report.texts(f'#final [aria-sort="{order}"]')) == 1


def test_a_finding_leads_to_its_channel(report: Report, files: dict[str, Path]) -> None:
    report.open(files["troubled"])
    report.click('[data-kind="gap"] button')
    assert report.texts('button.channel[aria-pressed="true"] bdi') == ["starved"]
    # A curve with a gap in it is two.
    path = report.run(
        "return document.querySelector('[data-metric=loss] path.line[data-channel=\"2\"]')"
        ".getAttribute('d')"
    )
    assert path.count("M") == 2


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
    report.click("#smooth")
    assert report.run(raw) == 0
    assert report.lines() == [-1, 0, 1, 2, 3]
