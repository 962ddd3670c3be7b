"""The numbers of the report as JSON that can stand inside an HTML page.

Channels and runs are numbers. A curve is `{run, channel, metric, split, steps, values, points}`,
and may have `low`, `high`, `smooth` (the strength), `estimate` and `overwritten`. The first curve
of a channel also has `tokens`: the channel's own, up to each step. Steps and tokens are written as
differences. Values have six digits; null breaks the line.

Labels of axes are numbered after the channels, and `label_axes` has the axis of each number; it is
empty for channels. `axes` has, for each run, what its steps are on other axes. `marks` has the
steps that charts mark, and `plan` the configured shares by channel.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from channel_metrics.analysis.axes import with_axis
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.axes import axes_of, marks_of
from channel_metrics.analysis.report.curves import Curve, curves_of
from channel_metrics.analysis.report.more_curves import mix_curves, other_curves, overwritten_curves
from channel_metrics.analysis.report.moving import WINDOW_PARTS
from channel_metrics.analysis.report.views import rank_channels, shown
from channel_metrics.analysis.rows import final_rows

if TYPE_CHECKING:
    from channel_metrics.analysis.report.views import RunView
    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.store import Steps
    from channel_metrics.analysis.summary import ChannelRow

__all__ = ["dump_json", "labels_of", "page_data"]

# The run's own values belong to no channel.
_WHOLE_RUN = -1
# At most so many labels of an axis; --axis shows all.
_MAX_LABELS = 100


def labels_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(axis, label) of the labels that the page has: those with the most tokens of each axis."""
    axes = dict.fromkeys(axis for run in runs for axis in run.axes)
    found = []
    for axis in axes:
        ranked = rank_channels([with_axis(run, axis) for run in runs if axis in run.axes])
        found += [(axis, label) for label in ranked[:_MAX_LABELS]]
    return found


def page_data(
    views: Sequence[RunView],
    channels: Sequence[str],
    limit: int,
    labels: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """The data for the script of the page.

    Args:
        views: the runs.
        channels: the channels that are shown.
        limit: the largest number of points per curve.
        labels: (axis, label) of labels that can be drawn in place of channels.
    """
    numbers = {name: number for number, name in enumerate(channels)} | {GLOBAL: _WHOLE_RUN}
    curves, rows = [], []
    for view in views:
        own = [name for name in channels if name in set(view.run.channels())]
        drawn = itertools.chain(
            curves_of(view.run, own, limit, range(1, len(WINDOW_PARTS) + 1)),
            mix_curves(view.run, own, limit),
            other_curves(view.run, own, limit),
            overwritten_curves(view.run, own, limit),
        )
        items = [_curve(curve, view.index, numbers) for curve in drawn]
        rows += [_row(row.row, view.index, row.index) for row in view.rows]
        for axis in view.run.axes:
            own_numbers = {
                label: number
                for number, (other, label) in enumerate(labels, len(channels))
                if other == axis
            }
            found, more_rows = _labels(view, axis, own_numbers, limit)
            items += found
            rows += more_rows
        _keep_first_tokens(items)
        curves += items
    return {
        "channels": [shown(name) for name in channels] + [shown(label) for _, label in labels],
        "label_axes": [""] * len(channels) + [shown(axis) for axis, _ in labels],
        "runs": [view.name for view in views],
        "rows": rows,
        "curves": curves,
        "axes": [_axes(view) for view in views],
        "marks": [[m | {"text": shown(m["text"])} for m in marks_of(v.run)] for v in views],
        "plan": [{row.index: _digits(row.configured) for row in view.rows} for view in views],
    }


def dump_json(value: Any) -> str:
    """JSON in ASCII without `<`, `>` and `&`, so it cannot end or open an HTML element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _labels(
    view: RunView, axis: str, numbers: dict[str, int], limit: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The curves and the rows of the labels of an axis."""
    run = with_axis(view.run, axis)
    own = [label for label in numbers if label in set(run.channels())]
    curves = curves_of(run, own, limit, range(1, len(WINDOW_PARTS) + 1))
    found = [_curve(c, view.index, numbers) for c in curves if c.channel in numbers]
    rows = [row for row in final_rows(run) if row.channel in numbers]
    return found, [_row(row, view.index, numbers[row.channel]) for row in rows]


def _row(row: ChannelRow, run: int, number: int) -> dict[str, Any]:
    return {
        "run": run,
        "channel": number,
        "tokens": row.tokens,
        "loss": _digits(row.last_loss),
        "change": _digits(row.change),
    }


def _axes(view: RunView) -> dict[str, Any]:
    return {
        name: {"steps": _differences(steps), "values": [_digits(v, 12) for v in values.tolist()]}
        for name, (steps, values) in axes_of(view.run).items()
    }


def _curve(curve: Curve, run: int, numbers: dict[str, int]) -> dict[str, Any]:
    item: dict[str, Any] = {
        "run": run,
        "channel": numbers[curve.channel],
        "metric": shown(curve.metric),
        "split": curve.split,
        "steps": _differences(curve.steps),
        "values": _rounded(curve.values.tolist()),
        "points": curve.num_points,
    }
    if curve.tokens is not None:
        item["tokens"] = _differences(curve.tokens)
    if curve.band is not None:
        low, high = curve.band
        item |= {"low": _rounded(low.tolist()), "high": _rounded(high.tolist())}
    if curve.smooth:
        item["smooth"] = curve.smooth
    flags = {"estimate": curve.is_estimate, "overwritten": curve.is_overwritten}
    return item | {name: True for name, on in flags.items() if on}


def _keep_first_tokens(curves: Sequence[dict[str, Any]]) -> None:
    """Drop the tokens of all curves of a channel but the first; the page interpolates them."""
    seen = set()
    for curve in curves:
        if curve["channel"] in seen:
            curve.pop("tokens", None)
        elif "tokens" in curve:
            seen.add(curve["channel"])


def _differences(steps: Steps) -> list[int]:
    return [int(step) for step in np.diff(steps, prepend=0)]


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [_digits(value) for value in values]


def _digits(value: float | None, count: int = 6) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{count}g}")
