"""The screen of `watch`: a table of the channels with sparklines.

>>> sparkline([4.0, 2.0, 1.0, 1.0], width=4)
'█▃▁▁'
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from channel_metrics.analysis.axes import meanings_shown
from channel_metrics.analysis.readers.keys import GLOBAL, Key, decode_keys
from channel_metrics.analysis.report.curves import is_over_run
from channel_metrics.analysis.report.views import shown
from channel_metrics.analysis.summary import WHOLE_RUN, number, part_of, percent, relative_change
from channel_metrics.analysis.tables import EMPTY, TableColumn, fitted
from channel_metrics.analysis.watch.traces import Trace, Traces
from channel_metrics.core.labels import UNLABELED

if TYPE_CHECKING:
    from rich.table import Table

    from channel_metrics.analysis.alerts import RunAlert
    from channel_metrics.analysis.watch.follow import Follower

__all__ = [
    "MAX_ALERTS",
    "ORDERS",
    "Row",
    "View",
    "alert_line",
    "header",
    "line_of",
    "render",
    "sparkline",
    "view_of",
]

ORDERS = ("share", "loss", "change", "name", "log")

MAX_ALERTS = 3
"""The last alerts are shown above the table, up to so many."""

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*#@"
_CURVE_COLUMNS = 24
_MAX_NAME_COLUMNS = 40
_LINE_CHANNELS = 8
_NOTES = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """A channel, or the whole run. Values that are not in the log are None."""

    name: str
    """The name in the log."""

    loss: float | None
    """The last loss; it may be NaN or infinite."""

    change: float | None
    """Relative change from the first loss to the last."""

    token_acc: float | None
    """The last accuracy."""

    share: float | None
    """Tokens / tokens of all channels; if tokens are not logged, the mean of the shares."""

    step: int | None
    """The last step with a loss or an accuracy."""

    curve: Sequence[float]
    """The losses for the sparkline."""

    split: str = "train"
    """The split of these values."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The contents of the screen."""

    rows: Sequence[Row]
    """The channels."""

    whole: Row
    """The values of the whole run."""

    step: int | None
    """The last step of the split."""

    split: str
    """`train`, or another split if only that has channels."""


def view_of(
    traces: Traces,
    *,
    channels: Sequence[str] = (),
    order: str = "share",
    axes: Sequence[str] = (),
    axis: str = "",
) -> View:
    """The contents of the screen for a log.

    Args:
        traces: the values so far.
        channels: names that are channels. By default, they are inferred from the keys.
        order: one of `ORDERS`. In all of them, `unlabeled` is last.
        axes: the axes that the log has labels of. Their labels are left aside.
        axis: one of them, whose labels are shown in place of the channels.
    """
    meanings = decode_keys(traces, [*channels, UNLABELED] if channels else ())
    meanings = meanings_shown(meanings, axes, axis)
    by_key = {meaning: traces[key] for key, meaning in meanings.items()}
    splits = dict.fromkeys(key.split for key in by_key if key.channel)
    split = "train" if "train" in splits or not splits else next(iter(splits))
    names = dict.fromkeys(key.channel for key in by_key if key.channel and key.split == split)
    shares = _shares(by_key, split, names, is_axis=bool(axis))
    rows = [_row(by_key, split, name, shares[name]) for name in names]
    # Channels that only another split has.
    others = {k.channel: k.split for k in by_key if k.channel and k.channel not in names}
    rows += [_row(by_key, other, name, None) for name, other in others.items()]
    steps = (trace.step for key, trace in by_key.items() if key.split == split and is_over_run(key))
    return View(
        rows=_ordered(rows, order),
        whole=_row(
            by_key, split if Key(split, GLOBAL, "loss") in by_key else "train", GLOBAL, None
        ),
        step=max((step for step in steps if step is not None), default=None),
        split=split,
    )


def sparkline(values: Sequence[float], *, width: int, bars: str = _BARS) -> str:
    """At most `width` bars between the lowest and the highest of `values` [N], in their order."""
    width = min(width, len(values))
    edges = [i * len(values) // width for i in range(width + 1)] if width else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if high <= low:
        return bars[0] * len(means)
    return "".join(bars[round((mean - low) / (high - low) * (len(bars) - 1))] for mean in means)


def render(
    view: View, *, width: int = 160, max_rows: int | None = None, is_ascii: bool = False
) -> Table:
    """A rich table of at most this width, and of at most `max_rows` channels."""
    bars = _ASCII_BARS if is_ascii else _BARS
    rows = [view.whole, *view.rows[:max_rows]]
    curves = [sparkline(row.curve, width=_CURVE_COLUMNS, bars=bars) for row in rows]
    columns = [
        TableColumn(
            "channel",
            [_name(row, view) for row in rows],
            is_name=True,
            max_width=_MAX_NAME_COLUMNS,
        ),
        TableColumn("loss", [number(row.loss) for row in rows]),
        TableColumn("change", [percent(row.change, "+.1%") for row in rows], 1),
        TableColumn("token acc", [percent(row.token_acc) for row in rows], 4),
        TableColumn("share", [percent(row.share) for row in rows], 2),
        TableColumn("at step", [EMPTY if row.step is None else f"{row.step:,}" for row in rows], 5),
        TableColumn("loss over the run", curves, 3, is_left=True),
    ]
    left = len(view.rows) - len(rows) + 1
    return fitted(
        columns,
        width,
        caption=f" and {left:,} more" if left else None,
        styles=[_style(row, view) for row in rows],
        has_total=True,
    )


def _name(row: Row, view: View) -> str:
    if not row.name:
        return WHOLE_RUN
    return shown(row.name) if row.split == view.split else f"{shown(row.name)} ({row.split})"


def _style(row: Row, view: View) -> str:
    if row.loss is not None and not math.isfinite(row.loss):
        return "red"
    return "dim" if row.name and row.step != view.step else ""


def header(follower: Follower, view: View) -> list[str]:
    """Lines about the log: file, last step and its age, problems."""
    lines = []
    if follower.source is not None:
        file = shown(str(follower.source.files[-1]))
        lines.append(f"{file} ({follower.source.format})")
        lines += [shown(note) for note in follower.source.notes[:_NOTES]]
    if view.step is not None:
        split = "" if view.split == "train" else f", channels of {view.split}"
        lines.append(f"step {view.step:,}{_age(follower)}{split}")
    if follower.waiting_for:
        lines.append(f"waiting: {shown(follower.waiting_for)}")
    if follower.traces and not view.rows:
        lines.append("no channel was found; name them with --channel, or see docs/analysis.md.")
    lines += [alert_line(alert) for alert in follower.alerts[-MAX_ALERTS:]]
    if follower.problems.count:
        last = shown(follower.problems.examples[-1])
        lines.append(f"{follower.problems.count:,} places could not be read, such as {last}")
    return lines


def alert_line(alert: RunAlert) -> str:
    """An alert in one line."""
    name = shown(alert.channel) if alert.channel else "the whole run"
    split = "" if alert.split == "train" else f" in {shown(alert.split)}"
    return f"alert at step {alert.step:,}: {name}{split}: {alert.kind}: {shown(alert.text)}"


def line_of(view: View, max_channels: int | None = None) -> str:
    """The view in one line, for output that is not a terminal."""
    limit = _LINE_CHANNELS if max_channels is None else max_channels
    parts = [f"step {view.step}", f"loss {number(view.whole.loss)}"]
    parts += [f"{shown(row.name)} {number(row.loss)}" for row in view.rows[:limit]]
    if len(view.rows) > limit:
        parts.append(f"and {len(view.rows) - limit:,} more")
    return "  ".join(parts)


def _row(by_key: Mapping[Key, Trace], split: str, name: str, share: float | None) -> Row:
    nothing = Trace()
    loss = by_key.get(Key(split, name, "loss"), nothing)
    accuracy = by_key.get(Key(split, name, "token_acc"), nothing)
    bad = by_key.get(Key(split, name, "nonfinite"), nothing)
    # If none of its tokens has a finite loss, the log has no loss.
    if name and bad.last and (bad.step or 0) > (loss.step or 0):
        loss = replace(loss, last=math.nan, step=bad.step)
    steps = [trace.step for trace in (loss, accuracy) if trace.step is not None]
    return Row(
        name=name,
        loss=loss.last,
        change=relative_change(loss.first, loss.last),
        token_acc=accuracy.last,
        share=share,
        step=max(steps, default=None),
        curve=loss.curve,
        split=split,
    )


def _shares(
    by_key: Mapping[Key, Trace], split: str, names: Mapping[str, None], *, is_axis: bool
) -> dict[str, float | None]:
    # The labels of an axis need not add up to the whole run.
    tokens = {name: None if is_axis else _tokens(by_key, split, name) for name in names}
    shares: dict[str, float | None] = {}
    for name in names:
        logged = by_key.get(Key(split, name, "share"))
        mean = logged.total / logged.count if logged and logged.count else None
        part = part_of(tokens, name)
        shares[name] = mean if part is None else part
    return shares


def _tokens(by_key: Mapping[Key, Trace], split: str, name: str) -> float | None:
    """The tokens of a channel since the run began; a resumed run goes on with the logged total."""
    total = by_key.get(Key(split, name, "tokens_total"))
    if total and total.last is not None and math.isfinite(total.last):
        return total.last
    windows = by_key.get(Key(split, name, "tokens"))
    return windows.total if windows else None


def _ordered(rows: Sequence[Row], order: str) -> list[Row]:
    def place(row: Row) -> tuple[bool, bool, float, str]:
        value = {"share": row.share, "loss": row.loss, "change": row.change}.get(order)
        # NaN comes before all numbers, because it is a problem.
        size = 0.0 if value is None else math.inf if math.isnan(value) else value
        name = row.name if order == "name" else ""
        return row.name == UNLABELED, value is None, -size, name

    return sorted(rows, key=place)


def _age(follower: Follower) -> str:
    """How long ago the log was written to."""
    try:
        written = max(f.stat().st_mtime for f in follower.source.files) if follower.source else 0
    except OSError:
        return ""
    seconds = max(0.0, time.time() - written)
    if seconds < 120:
        return f", {seconds:.0f} s ago"
    if seconds < 7200:
        return f", {seconds / 60:.0f} min ago"
    return f", {seconds / 3600:,.0f} h ago"
