"""The charts of the report, drawn by hand and by four libraries, in Chromium.

    npm install --prefix FOLDER uplot@1.6.32 @observablehq/plot@0.6.17 esbuild@0.28.2
    pip download --no-deps -d FOLDER plotly==7.1.0 bokeh==3.9.2
    python -m benchmarks.charts FOLDER

Draws 200 channels of 333 points (what a report of 200 channels holds) and of 5,000 points, under
the content security policy of the report. The first channels have hostile names. The ways take
turns for some rounds, each time in a new browser. For each way, it prints the size of the library,
the median milliseconds until the frame after drawing, after a change to a logarithmic axis and
after a zoom, and what the policy refused.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

DATA = """
const N = 200, P = POINTS, NAMES = ['<img src=x onerror="window.hacked=1">', "<b>x</b>"];
let seed = 1;
const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
const XS = Array.from({ length: P }, (_, i) => i + 1);
const value = (s, c) => 0.3 + 2 * ((c * 7) % N) / N + 3 * Math.exp(-8 * s / P) + 0.06 * random();
const YS = Array.from({ length: N }, (_, c) => XS.map((s) => value(s, c)));
for (let c = NAMES.length; c < N; c++) NAMES.push(`dataset_${c}`);
const COLORS = ["#0b57c9", "#d9730d", "#0d8f6b", "#8a1067", "#489cd1", "#c9352a"];
const color = (c) => COLORS[c % 6];
const host = document.getElementById("plot");
window.refused = new Set();
document.addEventListener("securitypolicyviolation", (e) => refused.add(e.effectiveDirective));
"""
# The paths are those of the report.
BY_HAND = """
const positions = () => XS;
PATHS
const made = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  return element;
};
window.render = (log, [low, high]) => {
  const bend = log ? Math.log : Number;
  const [floor, roof] = [bend(log ? 0.3 : 0), bend(5.4)];
  const x = (v) => 50 + (v - low) / (high - low) * 930;
  x.domain = [low, high];
  const y = (v) => 380 - (bend(v) - floor) / (roof - floor) * 370;
  const svg = made("svg", { width: 1100, height: 420 });
  YS.forEach((ys, c) => {
    const d = linePath({ values: ys }, x, y);
    svg.append(made("path", { d, fill: "none", stroke: color(c), "stroke-width": 0.9 }));
  });
  host.replaceChildren(svg);
};
"""
UPLOT = """
window.render = (log, range) => {
  host.replaceChildren();
  const points = { show: false };
  const line = (_, c) => ({ label: NAMES[c], stroke: color(c), width: 0.9, points });
  const scales = { x: { time: false, range: () => range }, y: { distr: log ? 3 : 1 } };
  const options = { width: 1100, height: 420, scales, legend: { show: false } };
  new uPlot({ ...options, series: [{}, ...YS.map(line)] }, [XS, ...YS], host);
};
"""
PLOT = """
window.render = (log, domain) => {
  const line = (ys, c) => ({ x: XS, y: ys, stroke: color(c), strokeWidth: 0.9, clip: true });
  const marks = YS.map((ys, c) => Plot.line({ length: P }, line(ys, c)));
  const y = { type: log ? "log" : "linear" };
  host.replaceChildren(Plot.plot({ width: 1100, height: 420, x: { domain }, y, marks }));
};
"""
PLOTLY = """
window.render = (log, range) => {
  const line = (y, c) => ({ x: XS, y, name: NAMES[c], mode: "lines", line: { color: color(c) } });
  const axes = { yaxis: { type: log ? "log" : "linear" }, xaxis: { range } };
  return Plotly.react("plot", YS.map(line), { width: 1100, height: 420, ...axes });
};
"""
BOKEH = """
window.render = (log, [start, end]) => {
  host.replaceChildren();
  const scale = { y_axis_type: log ? "log" : "linear", x_range: new Bokeh.Range1d({ start, end }) };
  const figure = Bokeh.Plotting.figure({ width: 1100, height: 420, ...scale });
  YS.forEach((ys, c) => figure.line(XS, ys, { line_color: color(c), line_width: 0.9 }));
  return Bokeh.Plotting.show(figure, "#plot");
};
"""
MEASURE = """
const [P, done] = arguments;
const frame = () => new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)));
(async () => {
  const times = [];
  for (const [log, range] of [[false, [1, P]], [true, [1, P]], [false, [1, P / 4]]]) {
    const start = performance.now();
    await render(log, range);
    await frame();
    times.push(Math.round(performance.now() - start));
  }
  done([times, [...refused].sort(), document.images.length, window.hacked ?? null]);
})();
"""
PATHS = Path(__file__).parents[1] / "channel_metrics" / "analysis" / "report" / "page" / "paths.js"
ENTRY = 'export { plot, line, areaY, dot, ruleX, ruleY, text } from "@observablehq/plot";'


@dataclass(frozen=True)
class Way:
    """A way to draw: a library in the folder, and the script that uses it."""

    name: str
    files: tuple[str, ...]
    script: str


WAYS = (
    Way("by hand, SVG", (), BY_HAND.replace("PATHS", PATHS.read_text(encoding="utf-8"))),
    Way("uPlot 1.6.32, canvas", ("node_modules/uplot/dist/uPlot.iife.min.js",), UPLOT),
    Way("Observable Plot 0.6.17, SVG", ("plot.js",), PLOT),
    Way("plotly.js of plotly 7.1.0, SVG", ("plotly/package_data/plotly.min.js",), PLOTLY),
    Way(
        "BokehJS of bokeh 3.9.2, canvas",
        ("bokeh/server/static/js/bokeh.min.js", "bokeh/server/static/js/bokeh-api.min.js"),
        BOKEH,
    ),
)


def prepare(folder: Path) -> None:
    """Unpack the wheels, and bundle the parts of Plot that a report would need."""
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    (folder / "entry.js").write_text(ENTRY)
    options = ("--bundle", "--minify", "--global-name=Plot", "--outfile=plot.js")
    esbuild = folder / "node_modules" / ".bin" / "esbuild"
    subprocess.run([esbuild, "entry.js", *options], cwd=folder, check=True, capture_output=True)


def page(library: str, script: str) -> str:
    """A page with the policy of the report."""

    def hash_of(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    scripts = [text.replace("</script", "<\\/script") for text in (library, script)]
    allowed = " ".join(f"'sha256-{hash_of(text)}'" for text in scripts)
    style = "body { font: 15px sans-serif }"
    policy = f"default-src 'none'; script-src {allowed}; style-src 'sha256-{hash_of(style)}'"
    return (
        f"<!DOCTYPE html><meta charset=utf-8><title>charts</title><meta http-equiv="
        f'"Content-Security-Policy" content="{policy}; img-src data:"><style>{style}</style>'
        f"<div id=plot></div><script>{scripts[0]}</script><script>{scripts[1]}</script>"
    )


def browser() -> Any:
    """Headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(120)
    return driver


def measure(way: Way, library: str, points: int) -> tuple[list[int], list[str]]:
    """The times of one drawing, in a new browser, and what the policy refused."""
    script = DATA.replace("POINTS", str(points)) + way.script
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as file:
        file.write(page(library, script))
        file.flush()
        driver = browser()
        driver.get(Path(file.name).as_uri())
        times, refused, images, hacked = driver.execute_async_script(MEASURE, points)
        driver.quit()
    assert images == 0 and hacked is None, way.name
    return times, refused


def main(folder: Path, num_rounds: int = 5) -> None:
    """Print one line for each number of points and each way."""
    prepare(folder)
    libraries = {
        way: "\n".join((folder / name).read_text(encoding="utf-8") for name in way.files)
        for way in WAYS
    }
    print("points | way | library, kB | draw, log, zoom, ms | refused by the policy")
    for points in (333, 5000):
        found = [
            {way: measure(way, library, points) for way, library in libraries.items()}
            for _ in range(num_rounds)
        ]
        for way, library in libraries.items():
            times = [*map(median, zip(*(of_round[way][0] for of_round in found), strict=True))]
            refused = found[0][way][1]
            size = len(library.encode()) // 1000
            print(f"{points} | {way.name} | {size} | {times} | {', '.join(refused) or 'nothing'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
