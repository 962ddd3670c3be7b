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

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from channel_metrics.analysis.axes import labels_of_channels
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.axes import axes_of, marks_of
from channel_metrics.analysis.report.curves import Curve, curves_of
from channel_metrics.analysis.report.more_curves import mix_curves, other_curves, overwritten_curves
from channel_metrics.analysis.report.moving import WINDOW_PARTS
from channel_metrics.analysis.report.views import shown

if TYPE_CHECKING:
    from channel_metrics.analysis.report.groupings import Grouping
    from channel_metrics.analysis.report.views import RunView
    from channel_metrics.analysis.store import Steps
    from channel_metrics.analysis.summary import ChannelRow

__all__ = ["dump_json", "page_data"]

# The run's own values belong to no channel.
_WHOLE_RUN = -1


def page_data(groupings: Sequence[Grouping], limit: int) -> dict[str, Any]:
    """The data for the script of the page.

    Args:
        groupings: what is shown of the runs. The first one has their channels.
        limit: the largest number of points per curve.
    """
    views = groupings[0].views
    curves, rows = [], []
    for grouping in groupings:
        for view in grouping.views:
            curves += [
                _curve(c, view.index, grouping.numbers) for c in _drawn(grouping, view, limit)
            ]
            rows += [_row(row.row, view.index, grouping.first + row.index) for row in view.rows]
    _keep_first_tokens(curves)
    return {
        "channels": [shown(name) for grouping in groupings for name in grouping.names],
        "labels": _labels(groupings),
        "label_axes": [grouping.title for grouping in groupings for _ in grouping.names],
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


def _labels(groupings: Sequence[Grouping]) -> list[str]:
    """For each name what the search finds it by, besides the name: the labels of a channel."""
    found: dict[str, set[str]] = {}
    for view in groupings[0].views:
        for name, labels in labels_of_channels(view.run).items():
            found.setdefault(name, set()).update(map(shown, labels))
    return [
        "" if grouping.axis else " ".join(sorted(found.get(name, ())))
        for grouping in groupings
        for name in grouping.names
    ]


def _drawn(grouping: Grouping, view: RunView, limit: int) -> Iterator[Curve]:
    """The curves of a run. Those of the whole run come with its channels, not with labels."""
    run = view.run
    there = set(run.channels())
    own = [name for name in grouping.names if name in there]
    curves = curves_of(run, own, limit, range(1, len(WINDOW_PARTS) + 1))
    if grouping.axis:
        yield from (curve for curve in curves if curve.channel != GLOBAL)
        return
    yield from curves
    yield from mix_curves(run, own, limit)
    yield from other_curves(run, own, limit)
    yield from overwritten_curves(run, own, limit)


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
        "channel": numbers.get(curve.channel, _WHOLE_RUN),
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
        channel = (curve["run"], curve["channel"])
        if channel in seen:
            curve.pop("tokens", None)
        elif "tokens" in curve:
            seen.add(channel)


def _differences(steps: Steps) -> list[int]:
    return [int(step) for step in np.diff(steps, prepend=0)]


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [_digits(value) for value in values]


def _digits(value: float | None, count: int = 6) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{count}g}")
