"""The report in a real browser: it answers to mouse and keyboard, and anyone can read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.browser import DOWN, ENTER, ESCAPE, TAB, Report, needs_browser

pytestmark = needs_browser


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
