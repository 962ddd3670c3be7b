"""Static pictures of the main curves, as PNG and SVG, for papers and chats.

Only the largest channels are drawn. The picture says how many there are.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.curves import Curve, charts, curves_of
from channel_metrics.analysis.report.views import rank_channels, shown
from channel_metrics.extras import need

if TYPE_CHECKING:
    from collections.abc import Iterator

    from channel_metrics.analysis.run import Run
    from channel_metrics.core.schema import Metric

__all__ = ["DASHES", "PALETTE", "WHOLE_RUN", "styled", "write_pictures"]

# The colours of the report on a light page. They differ for every kind of colour blindness.
PALETTE = (
    "#0b57c9",
    "#d9730d",
    "#0d8f6b",
    "#8a1067",
    "#489cd1",
    "#c9352a",
    "#a463ee",
    "#3f3a00",
)
DASHES = ("-", "--", ":", "-.")
WHOLE_RUN = "#6b7178"
_MAX_POINTS = 1500
_MAX_NAME = 28
_STYLE = {
    # A dollar in a name must not begin a formula.
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a9097",
    "axes.axisbelow": True,
    "grid.color": "#e4e4de",
    # With this, the same run gives the same file.
    "svg.hashsalt": "channel_metrics",
}


def write_pictures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write a .png and a .svg for each metric that has a chart and that the runs have."""
    figures: Any = need("matplotlib.figure", extra="report")
    ranked = rank_channels(runs)
    channels = ranked[: len(PALETTE)]
    curves = [(i, c) for i, run in enumerate(runs) for c in curves_of(run, channels, _MAX_POINTS)]
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for metric in charts():
        found = [(i, c) for i, c in curves if c.metric == metric.name and c.split == "train"]
        if not found:
            continue
        with styled():
            figure = figures.Figure(figsize=(9, 4.4), layout="constrained")
            _draw(figure.subplots(), metric, found, channels, runs)
            if len(ranked) > len(channels):
                note = f"the {len(channels)} largest of {len(ranked)} channels"
                figure.text(0.01, 0.01, note, fontsize=8, color=WHOLE_RUN)
            for suffix, more in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
                path = folder / f"{metric.name.replace('/', '_')}.{suffix}"
                figure.savefig(path, **more)
                written.append(path)
    return written


def _draw(
    axis: Any,
    metric: Metric,
    curves: Sequence[tuple[int, Curve]],
    channels: Sequence[str],
    runs: Sequence[Run],
) -> None:
    smooth = {(i, c.channel) for i, c in curves if c.is_smooth}
    named: dict[str, Any] = {}
    for number, curve in curves:
        raw = not curve.is_smooth and (number, curve.channel) in smooth
        color = WHOLE_RUN if curve.channel == GLOBAL else PALETTE[channels.index(curve.channel)]
        (line,) = axis.plot(
            curve.steps,
            curve.values,
            color=color,
            linewidth=0.6 if raw else 1.8,
            alpha=0.3 if raw else 1.0,
            linestyle="--" if curve.channel == GLOBAL else DASHES[number % len(DASHES)],
        )
        if not raw:
            named.setdefault(curve.channel, line)
    axis.set_title(metric.label, loc="left", fontweight="bold")
    axis.set_xlabel("step")
    if axis.dataLim.ymin >= 0:
        axis.set_ylim(bottom=0, top=1 if metric.name == "token_acc" else None)
    axis.grid(axis="y")
    if not metric.unit:
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if len(runs) > 1:
        for run, dash in zip(runs, itertools.cycle(DASHES), strict=False):
            (line,) = axis.plot([], [], color="black", linewidth=1.2, linestyle=dash)
            named[f"{_label(run.name)} (run)"] = line
    # matplotlib leaves out names that begin with "_", so each name gets a blank before it.
    labels = [f" {_label(name) if name != GLOBAL else 'whole run'}" for name in named]
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
    axis.legend(list(named.values()), labels, **place)


def _label(name: str) -> str:
    text = shown(name)
    return text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 1]}…"


@contextmanager
def styled() -> Iterator[None]:
    """The style of all pictures. Characters that the font lacks are drawn as boxes."""
    matplotlib: Any = need("matplotlib", extra="report")
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        yield
