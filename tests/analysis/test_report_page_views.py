"""The report in a real browser: other axes, smoothing, differences, marks, the mix, the address."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.analysis_tools import series_of
from analysis.browser import END, HOME, Report, needs_browser
from analysis.report_runs import FOUR, rich_run, run_with
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.moving import WINDOW_PARTS, MovingMeans

pytestmark = needs_browser

UP = "\ue013"
PATH = """
const path = document.querySelector(`[data-metric=${arguments[0]}] path.line[data-channel="0"]`);
return path.getAttribute("d").slice(1).split("L").map((place) => place.split(" ").map(Number));
"""


def value_of(aloud: str, label: str) -> float:
    """The number that a chart says for a curve."""
    (text,) = (part for part in aloud.split(", ") if part.startswith(f"{label}: "))
    return float(text.removeprefix(f"{label}: ").removesuffix("%"))


def test_all_axes_have_the_places_of_the_log(report: Report, files: dict[str, Path]) -> None:
    run = rich_run()
    report.open(files["rich"])
    report.click("#runs .chip", 1)
    tokens = [series_of(run, name, "tokens") for name in ("a", "b")]
    whole = sum(sum(series.values()) for series in tokens)
    for x, last in (
        ("all_tokens", f"{whole:,.0f} tokens of all channels, "),
        ("epoch", "epoch 4, "),
        ("time", "18.55 min, "),
        ("steps", "step 160, "),
    ):
        report.click(f'input[value="{x}"] + span')
        assert report.read(END).startswith(last)
        assert "whole run · rich: " in report.read(END)
    # Step 40 of 160 is the end of the first of four epochs.
    report.choose("#smooth", "0")
    report.click('input[value="epoch"] + span')
    places = [x for x, _ in report.run(PATH, "loss")]
    ticks = report.run(
        "return [...document.querySelectorAll('[data-metric=loss] .tick[text-anchor=middle]')]"
        ".map((tick) => [Number(tick.textContent), Number(tick.getAttribute('x'))])"
    )
    assert len(places) == 160
    assert places[39] == pytest.approx(dict(map(tuple, ticks))[1], abs=1)


def test_axes_that_the_log_lacks_are_not_offered(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"])
    assert report.texts("#x-axis span") == ["steps", "own tokens", "all tokens"]


def test_log_steps(report: Report, files: dict[str, Path]) -> None:
    report.open(files["rich"])
    report.choose("#smooth", "0")
    report.click("#log-x")
    places = [x for x, _ in report.run(PATH, "loss")]
    # 1, 2, 4, ... 128 are equally far apart.
    distances = [places[2 * s - 1] - places[s - 1] for s in (1, 2, 4, 8, 16, 32, 64)]
    assert distances == pytest.approx([distances[0]] * 7, abs=0.2) and distances[0] > 50


def test_strengths_of_smoothing_are_means_of_the_log(
    report: Report, files: dict[str, Path]
) -> None:
    means = MovingMeans(rich_run(), [])
    report.open(files["rich"])
    for strength, part in enumerate(WINDOW_PARTS, 1):
        report.choose("#smooth", str(strength))
        expected = means.of("a", "loss", part=part)[1]
        for key, mean in ((HOME, expected[0]), (END, expected[-1])):
            assert value_of(report.read(key), "a · rich") == pytest.approx(mean, abs=1e-3)


def test_the_values_are_zoomed_in_one_chart(report: Report, files: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains

    report.open(files["four"])
    levels = "[data-metric=loss] .axes text[text-anchor=end].tick"
    steps = "[data-metric=loss] .axes text[text-anchor=middle]"
    others = "[data-metric=token_acc] .axes text[text-anchor=end].tick"
    before = [report.texts(ticks) for ticks in (levels, steps, others)]
    plot = report.driver.find_element("css selector", "[data-metric=loss] .plot")
    report.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    drag = ActionChains(report.driver, duration=50)
    drag.move_to_element(plot).click_and_hold().move_by_offset(0, 90).release().perform()
    after = [report.texts(ticks) for ticks in (levels, steps, others)]
    assert after[0] != before[0] and after[1:] == before[1:]
    report.click("#reset-zoom")
    assert report.texts(levels) == before[0]
    report.read(END)
    report.read(UP)
    assert report.texts(levels) != before[0]


def test_ticks_have_equal_distances(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"])
    levels = "[data-metric=loss] .axes text[text-anchor=end].tick"
    # No tick is rounded to a value that it does not have.
    for high, distance in ((6, 1), (1.7, 0.25), (0.17, 0.025), (0.011, 0.002)):
        report.go_to(f"y.loss=0..{high}")
        ticks = [float(text) for text in report.texts(levels)]
        assert ticks == pytest.approx([n * distance for n in range(len(ticks))]), high
        assert len(ticks) > 4


def test_the_difference_of_two_runs(report: Report, files: dict[str, Path]) -> None:
    base, other = (series_of(run_with(FOUR, seed=seed), "bbu", "loss") for seed in (0, 5))
    report.open(files["two"])
    report.click("#difference")
    assert report.lines() == [-1, 0, 1, 2, 3]
    assert report.texts("#minus bdi") == ["base"]
    for key, step in ((HOME, 1), (END, 40)):
        said = value_of(report.read(key), "bbu · other")
        assert said == pytest.approx(other[step] - base[step], abs=1e-3)
    report.click("#difference")
    assert len(report.lines()) == 10


def test_what_a_resume_overwrote_is_drawn_pale(report: Report, files: dict[str, Path]) -> None:
    report.open(files["resumed"])
    names = (
        "return [...document.querySelectorAll('[data-metric=loss] path.overwritten.raw')].length"
    )
    assert report.run(names) == len(report.lines()) > 1
    assert "resumed" in report.texts("#dashes li")


def test_marks(report: Report, files: dict[str, Path]) -> None:
    count = "return document.querySelectorAll('[data-metric=loss] .event.' + arguments[0]).length"
    report.open(files["rich"])
    assert report.run(count, "alert") == 2  # one of each run
    assert report.run(count, "evaluation") == 8
    texts = report.texts("#dashes li")
    assert "alert" in texts and "step with an evaluation" in texts and "resumed" not in texts
    report.run(
        "const plot = document.querySelector('[data-metric=loss] .plot');"
        "const { left, top } = plot.getBoundingClientRect();"
        "const x = parseFloat(plot.querySelector('.event.alert').getAttribute('d').slice(1));"
        "const at = { clientX: left + x, clientY: top + 50 };"
        "plot.dispatchEvent(new PointerEvent('pointermove', at));"
    )
    assert "alert_rising" in report.texts(".tip li")
    report.click("#marks")
    assert report.run(count, "alert") == report.run(count, "evaluation") == 0


def test_the_mix_over_time_against_the_plan(report: Report, files: dict[str, Path]) -> None:
    run = rich_run()
    report.open(files["rich"])
    totals = {name: sum(series_of(run, name, "samples").values()) for name in ("a", "b")}
    said = value_of(report.read(END, "mix"), "a · rich")
    assert said == pytest.approx(100 * totals["a"] / sum(totals.values()), abs=0.06)
    heights = report.run(
        "return [...document.querySelectorAll('[data-metric=mix] .plan')]"
        ".map((path) => Number(path.getAttribute('d').match(/ ([^H]+)H/)[1]))"
    )
    ticks = report.run(
        "return [...document.querySelectorAll('[data-metric=mix] .tick[text-anchor=end]')]"
        ".map((tick) => [parseFloat(tick.textContent), Number(tick.getAttribute('y')) - 4])"
    )
    (low, bottom), (high, top) = ticks[0], ticks[-1]
    shares = {round(low + (high - low) * (y - bottom) / (top - bottom)) for y in heights}
    assert shares == {25, 75}


def test_any_other_series_is_drawn_on_request(report: Report, files: dict[str, Path]) -> None:
    norms = series_of(rich_run(), GLOBAL, "grad_norm")
    report.open(files["rich"])
    offered = report.run(
        "return [...document.querySelectorAll('#other option')].map((o) => o.text)"
    )
    assert {"grad_norm", "learning_rate", "tokens", "samples"} <= set(offered)
    report.choose("#other", "grad_norm")
    assert report.lines("grad_norm") == [-1, -1]
    said = value_of(report.read(END, "grad_norm"), "whole run · rich")
    assert said == pytest.approx(norms[160], abs=1e-3)
    report.click("[data-metric=grad_norm] .remove")
    assert "grad_norm" not in report.texts("figcaption h3")


def test_intervals_of_the_log_are_bands(report: Report, files: dict[str, Path]) -> None:
    report.open(files["rich"])
    bands = "return document.querySelectorAll('[data-metric=loss] path.band').length"
    assert report.run(bands) == 4
    assert "95 % interval" in report.texts("#dashes li")
    report.open(files["four"])
    assert report.run(bands) == 0
    assert "95 % interval" not in report.texts("#dashes li")


def test_what_a_resume_overwrote_is_drawn_and_explained(
    report: Report, files: dict[str, Path]
) -> None:
    report.open(files["resumed"])
    assert "overwritten after a resume" in report.texts("#dashes li")
    opacity = report.run(
        "return [...document.querySelectorAll('[data-metric=loss] path.overwritten')]"
        ".map((line) => Number(getComputedStyle(line).strokeOpacity))"
    )
    # Three channels and the whole run.
    assert len(opacity) == 4 and min(opacity) > 0.5
    report.open(files["four"])
    assert "overwritten after a resume" not in report.texts("#dashes li")


@pytest.mark.parametrize("width", [1440, 768, 390])
def test_names_in_tables_are_not_broken_and_bars_are_in_view(
    report: Report, files: dict[str, Path], width: int
) -> None:
    report.open(files["many"], width=width)
    names = "return [...document.querySelectorAll('tbody th button')].map((e) => e.offsetHeight)"
    assert len(set(report.run(names))) == 1
    report.open(files["troubled"], width=width)
    ends = report.run(
        "return [...document.querySelectorAll('#mix .bar')]"
        ".map((bar) => bar.getBoundingClientRect().right)"
    )
    assert width == 390 or max(ends) < width


def test_the_address_holds_the_view(report: Report, files: dict[str, Path]) -> None:
    def view() -> list[object]:
        pressed = report.run(
            "return [...document.querySelectorAll('[aria-pressed=true]')].map((e) => e.textContent)"
        )
        charts = (report.texts("figcaption h3"), report.lines(), report.read(END))
        ticks = report.texts(".axes text")
        search = report.run("return [smooth.value, order.value, search.value, top.value]")
        return [pressed, *charts, ticks, search]

    report.open(files["rich"])
    usual = view()
    report.click('input[value="epoch"] + span')
    for button in ("#log", "#log-x", "#marks", "#zero"):
        report.click(button)
    report.choose("#smooth", "3")
    report.choose("#other", "grad_norm")
    report.click("#splits .chip", 1)
    report.click("#runs .chip", 1)
    report.click("#legend-list button", 1)
    report.read(END)
    report.read("+")
    report.read(UP)
    report.click("#search")
    report.keys("b")
    sent = report.run("return location.href")
    chosen = view()
    assert chosen != usual
    report.open(files["four"])
    report.driver.get(sent)
    assert view() == chosen
    report.run("location.hash = '#x=steps'")
    report.driver.get(files["rich"].as_uri())
    assert view() == usual


def test_a_bad_address_is_no_error(report: Report, files: dict[str, Path]) -> None:
    report.open(files["four"])
    bad = "x=constructor&zoom=9..1&y.loss=a..b&channels=0.99.-1.x&only=77&order=__proto__&chart=no"
    report.go_to(f"{bad}&smooth=99&top=x")
    assert report.texts("#legend-count") == ["1 of 4 drawn"]
    assert report.lines() == [-1, 0]
    report.go_to("runs=&splits=no")
    assert report.lines() == []
    assert len(report.texts(".nothing")) == 4
    report.go_to("x=tokens")
    assert report.lines() == [0, 1, 2, 3]
    assert report.complaints() == []
