"""The numbers of the report as JSON that can stand inside an HTML page.

Channels and runs are numbers. A curve is `{run, channel, metric, split, steps, values, points}`,
and may have `low`, `high`, `smooth` (the strength), `estimate` and `overwritten`. The first curve
of a channel also has `tokens`: the channel's own, up to each step. Steps and tokens are written as
differences. Values have six digits; null breaks the line.

`axes` has, for each run, what its steps are on other axes. `marks` has the steps that charts mark,
and `plan` the configured shares by channel.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.axes import axes_of, marks_of
from channel_metrics.analysis.report.curves import Curve, curves_of
from channel_metrics.analysis.report.more_curves import mix_curves, other_curves, overwritten_curves
from channel_metrics.analysis.report.moving import WINDOW_PARTS
from channel_metrics.analysis.report.views import shown

if TYPE_CHECKING:
    from channel_metrics.analysis.report.views import RunView
    from channel_metrics.analysis.store import Steps

__all__ = ["dump_json", "page_data"]

# The run's own values belong to no channel.
_WHOLE_RUN = -1


def page_data(views: Sequence[RunView], channels: Sequence[str], limit: int) -> dict[str, Any]:
    """The data for the script of the page. limit: the largest number of points per curve."""
    numbers = {name: number for number, name in enumerate(channels)} | {GLOBAL: _WHOLE_RUN}
    curves = []
    for view in views:
        own = [name for name in channels if name in set(view.run.channels())]
        drawn = itertools.chain(
            curves_of(view.run, own, limit, range(1, len(WINDOW_PARTS) + 1)),
            mix_curves(view.run, own, limit),
            other_curves(view.run, own, limit),
            overwritten_curves(view.run, own, limit),
        )
        items = [_curve(curve, view.index, numbers) for curve in drawn]
        _keep_first_tokens(items)
        curves += items
    return {
        "channels": [shown(name) for name in channels],
        "runs": [view.name for view in views],
        "rows": [
            {
                "run": view.index,
                "channel": row.index,
                "tokens": row.row.tokens,
                "loss": _digits(row.row.last_loss),
                "change": _digits(row.row.change),
            }
            for view in views
            for row in view.rows
        ],
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
