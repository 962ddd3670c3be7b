"""The screen of `watch`: a table of the channels with sparklines.

>>> sparkline([4.0, 2.0, 1.0, 1.0], width=4)
'█▃▁▁'
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from channel_metrics.analysis.readers.keys import GLOBAL, Key, decode_keys
from channel_metrics.analysis.report.curves import charts
from channel_metrics.analysis.report.views import shown
from channel_metrics.analysis.summary import number, percent
from channel_metrics.analysis.watch.traces import Trace, Traces
from channel_metrics.core.labels import UNLABELED

if TYPE_CHECKING:
    from rich.table import Table

    from channel_metrics.analysis.watch.follow import Follower

__all__ = ["ORDERS", "Row", "View", "header", "line_of", "render", "sparkline", "view_of"]

ORDERS = ("share", "loss", "change", "name", "log")

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*#@"
_CURVE_COLUMNS = 24
_MAX_NAME_COLUMNS = 40
_LINE_CHANNELS = 8


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


def view_of(traces: Traces, *, channels: Sequence[str] = (), order: str = "share") -> View:
    """The contents of the screen for a log.

    Args:
        traces: the values so far.
        channels: names that are channels. By default, they are inferred from the keys.
        order: one of `ORDERS`. In all of them, `unlabeled` is last.
    """
    meanings = decode_keys(traces, [*channels, UNLABELED] if channels else ())
    by_key = {meaning: traces[key] for key, meaning in meanings.items()}
    splits = dict.fromkeys(key.split for key in by_key if key.channel)
    split = "train" if "train" in splits or not splits else next(iter(splits))
    names = dict.fromkeys(key.channel for key in by_key if key.channel and key.split == split)
    shares = _shares(by_key, split, names)
    rows = [_row(by_key, split, name, shares[name]) for name in names]
    # Megatron logs some values of its own over samples instead of steps.
    over_steps = {metric.name for metric in charts()}
    steps = (
        trace.step
        for key, trace in by_key.items()
        if key.split == split and (key.channel or key.metric in over_steps)
    )
    return View(
        rows=_ordered(rows, order),
        whole=_row(by_key, split, GLOBAL, None),
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


def render(view: View, *, max_rows: int | None = None, is_ascii: bool = False) -> Table:
    """A rich table of at most `max_rows` channels. Names are not interpreted as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    bars = _ASCII_BARS if is_ascii else _BARS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(
        "channel", no_wrap=True, overflow="ellipsis", max_width=_MAX_NAME_COLUMNS, style="bold"
    )
    for heading in ("loss", "change", "token acc", "share", "at step"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("loss over the run", no_wrap=True, min_width=8, max_width=_CURVE_COLUMNS)
    rows = view.rows[:max_rows]
    for row in (view.whole, *rows):
        name = shown(row.name) if row.name else "(whole run)"
        cells = [name, *_cells(row), sparkline(row.curve, width=_CURVE_COLUMNS, bars=bars)]
        # A channel that was not in the last window shows its older values.
        style = "dim" if row.name and row.step != view.step else ""
        if row.loss is not None and not math.isfinite(row.loss):
            style = "red"
        table.add_row(*(Text(cell, style=style) for cell in cells), end_section=not row.name)
    if len(rows) < len(view.rows):
        more = f"and {len(view.rows) - len(rows):,} more"
        table.add_row(Text(more, style="dim"))
    return table


def header(follower: Follower, view: View) -> list[str]:
    """Lines about the log: file, last step and its age, problems."""
    lines = []
    if follower.source is not None:
        file = shown(str(follower.source.files[-1]))
        lines.append(f"{file} ({follower.source.format})")
    if view.step is not None:
        split = "" if view.split == "train" else f", channels of {view.split}"
        lines.append(f"step {view.step:,}{_age(follower)}{split}")
    if follower.waiting_for:
        lines.append(f"waiting: {shown(follower.waiting_for)}")
    if follower.traces and not view.rows:
        lines.append("no channel was found; name them with --channel, or see docs/analysis.md.")
    if follower.problems.count:
        last = shown(follower.problems.examples[-1])
        lines.append(f"{follower.problems.count:,} places could not be read, such as {last}")
    return lines


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
    steps = [trace.step for trace in (loss, accuracy) if trace.step is not None]
    has_change = loss.first and loss.last is not None and math.isfinite(loss.last)
    return Row(
        name=name,
        loss=loss.last,
        change=loss.last / loss.first - 1 if has_change and loss.last and loss.first else None,
        token_acc=accuracy.last,
        share=share,
        step=max(steps, default=None),
        curve=loss.curve,
    )


def _shares(
    by_key: Mapping[Key, Trace], split: str, names: Mapping[str, None]
) -> dict[str, float | None]:
    tokens = {name: by_key.get(Key(split, name, "tokens")) for name in names}
    whole = sum(trace.total for trace in tokens.values() if trace)
    shares: dict[str, float | None] = {}
    for name, trace in tokens.items():
        share = by_key.get(Key(split, name, "share"))
        if trace and whole:
            shares[name] = trace.total / whole
        else:
            shares[name] = share.total / share.count if share and share.count else None
    return shares


def _ordered(rows: Sequence[Row], order: str) -> list[Row]:
    def place(row: Row) -> tuple[bool, bool, float, str]:
        value = {"share": row.share, "loss": row.loss, "change": row.change}.get(order)
        # NaN comes before all numbers, because it is a problem.
        size = 0.0 if value is None else math.inf if math.isnan(value) else value
        name = row.name if order == "name" else ""
        return row.name == UNLABELED, value is None, -size, name

    return sorted(rows, key=place)


def _cells(row: Row) -> Iterator[str]:
    yield number(row.loss)
    yield percent(row.change, "+.1%")
    yield percent(row.token_acc)
    yield percent(row.share)
    yield "-" if row.step is None else f"{row.step:,}"


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
