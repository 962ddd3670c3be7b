"""The report: one HTML file that needs no other file.

    write_report([load_run(Path("runs/debug"))], Path("report.html"))

Names and logs may be hostile. jinja2 escapes all of them, and the numbers for the script are in a
JSON element, whose text cannot end the element. The content security policy of the page allows only
its own script and style (by their hashes), and no requests.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.analysis.judging.finding import shortened
from channel_metrics.analysis.judging.told import findings_of
from channel_metrics.analysis.report.curves import charts
from channel_metrics.analysis.report.groupings import groupings_of, numbered
from channel_metrics.analysis.report.more_curves import EPOCHS, MIX
from channel_metrics.analysis.report.page_data import dump_json, page_data
from channel_metrics.analysis.report.views import shown, views_of
from channel_metrics.analysis.whole_file import whole_file
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.extras import need

if TYPE_CHECKING:
    from channel_metrics.analysis.judging.finding import Finding
    from channel_metrics.analysis.report.groupings import Grouping
    from channel_metrics.analysis.report.views import RunView
    from channel_metrics.analysis.run import Run

__all__ = ["MAX_BYTES", "ReportSize", "write_report", "write_views"]

MAX_BYTES = 6_000_000

_MAX_RUNS = 8
_MAX_CHANNELS = 1000
_MAX_POINTS = 2000
_MIN_POINTS = 20
# The points of all curves together, at first. If the page is too large, there are fewer.
_ALL_POINTS = 200_000
_NOTHING, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
_SCRIPTS = (
    "data",
    "format",
    "state",
    "places",
    "compare",
    "paths",
    "lines",
    "cursor",
    "axes",
    "chart",
    "legend",
    "tables",
    "save",
    "dashes",
    "main",
    "address",
)


@dataclass(frozen=True, kw_only=True)
class ReportSize:
    """The size of a report, and what it leaves out."""

    num_bytes: int
    """The size of the file."""

    max_points: int
    """The largest number of points of one curve."""

    num_channels: int
    """The number of channels that are shown."""

    num_left_out: int
    """The number of channels that are left out, which are those with the fewest tokens."""


def write_report(runs: Sequence[Run], path: Path, *, title: str = "") -> ReportSize:
    """Write the report of one run, or a comparison of several.

    The file has at most `MAX_BYTES`. Curves are thinned out until it fits. If that is not enough,
    channels and labels with few tokens are left out, but not from the findings. The page says so.
    Raises `ChannelMetricsError` for no runs, or too many.
    """
    views = views_of(runs)
    return write_views(views, [findings_of(view) for view in views], path, title=title)


def write_views(
    views: Sequence[RunView], found: Sequence[Sequence[Finding]], path: Path, *, title: str = ""
) -> ReportSize:
    """The same, where the contents about the runs and their findings are there already."""
    if not 0 < len(views) <= _MAX_RUNS:
        raise ChannelMetricsError(
            f"expected 1 to {_MAX_RUNS} runs to compare, but got {len(views)}; name fewer."
        )
    every = groupings_of(views, found)
    groupings = numbered(every, _MAX_CHANNELS)
    num_names = [len(grouping.names) for grouping in groupings]
    limit = max(num_names)
    points = _first_limit(sum(num_names) * len(views))
    while True:
        text = _render(groupings, points=points, title=title)
        page = text.encode("utf-8", errors="replace")
        if len(page) < MAX_BYTES or not limit:
            break
        if points > _MIN_POINTS:
            points = max(_MIN_POINTS, int(0.9 * points * MAX_BYTES / len(page)))
        else:
            limit = int(0.9 * limit * MAX_BYTES / len(page))
            groupings = numbered(every, limit)
    with whole_file(path) as part:
        part.write_bytes(page)
    return ReportSize(
        num_bytes=len(page),
        max_points=points,
        num_channels=len(groupings[0].names),
        num_left_out=groupings[0].num_left_out,
    )


def _first_limit(num_names: int) -> int:
    num_curves = len(charts()) * max(1, num_names)
    return min(_MAX_POINTS, max(_MIN_POINTS, _ALL_POINTS // num_curves))


def _render(groupings: Sequence[Grouping], *, points: int, title: str) -> str:
    markup: Any = need("markupsafe", extra="report").Markup
    views = groupings[0].views
    data = page_data(groupings, points)
    drawn = {curve["metric"] for curve in data["curves"]}
    style, script = _file("page.css"), _script()
    text: str = _template().render(
        title=shown(title or " · ".join(view.run.name for view in views)),
        runs=views,
        groupings=groupings,
        thinned=_thinned(data),
        max_points=points,
        charts=[metric for metric in (*charts(), MIX, EPOCHS) if metric.name in drawn],
        names=data["channels"],
        style=markup(style),
        script=markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=markup(dump_json(data)),
    )
    return text.lstrip()


def _template() -> Any:
    jinja2: Any = need("jinja2", extra="report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "loss": _loss,
        "percent": _percent,
        "points": _points,
        "count": _count,
        "finite": _finite,
        "shortened": shortened,
    }
    return environment.from_string(_file("page.html"))


def _script() -> str:
    parts = "\n".join(_file(f"{name}.js") for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();\n'


def _file(name: str) -> str:
    folder = resources.files("channel_metrics.analysis.report") / "page"
    return (folder / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _thinned(data: dict[str, Any]) -> int:
    """The largest number of points of a curve in the log, if some are not drawn; else 0."""
    names = {metric.name for metric in charts()}
    curves = [c for c in data["curves"] if "smooth" not in c and c["metric"] in names]
    longest = max((curve["points"] for curve in curves), default=0)
    return longest if any(c["points"] > len(c["steps"]) for c in curves) else 0


def _loss(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:.4f}" if math.isfinite(value) else "NaN" if math.isnan(value) else str(value)


def _finite(values: Sequence[Any], attribute: str) -> list[Any]:
    """The values of which an attribute, such as `row.last_loss`, is a finite number."""
    found = [(value, attrgetter(attribute)(value)) for value in values]
    return [value for value, number in found if number is not None and math.isfinite(number)]


def _percent(value: float | None, spec: str = ".1%") -> str:
    return _NOTHING if value is None else format(value, spec).replace("-", _MINUS)


def _points(value: float | None) -> str:
    """A difference of two shares, in percentage points."""
    return _NOTHING if value is None else f"{100 * value:+.1f}".replace("-", _MINUS)


def _count(value: int | None) -> str:
    return _NOTHING if value is None else f"{value:,}"
