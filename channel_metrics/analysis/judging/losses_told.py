"""What is found about losses, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from channel_metrics.analysis.judging.finding import Finding, bad, listed, subject_of
from channel_metrics.analysis.judging.means import LEVEL, MIN_VALUES
from channel_metrics.analysis.judging.nonfinite import GRADIENT
from channel_metrics.analysis.readers.keys import GLOBAL

if TYPE_CHECKING:
    from channel_metrics.analysis.judging.nonfinite import NonFinite
    from channel_metrics.analysis.judging.trends import Trend
    from channel_metrics.analysis.report.views import RunView

__all__ = ["not_finite", "not_worse", "unknown", "worse", "worse_than_first"]

_UNKNOWN = {
    "zero": "a loss of exactly 0 may also mean that nothing was counted",
    "few": f"there are fewer than {MIN_VALUES} values",
    "noisy": "noise can explain a rise or hide one, or only the end rose",
    "estimated": "the losses are estimates",
}


def not_finite(view: RunView, *, is_final: bool) -> Iterator[Finding]:
    """Losses that are NaN or infinite, to the end or in places."""
    for item in view.nonfinite_losses:
        if item.is_final != is_final:
            continue
        kind, text = _when_not_finite(item)
        if item.channel == GLOBAL:
            text += _first_channels(view)
        if item.metric == GRADIENT:
            yield Finding(kind=kind, level="bad", text=text, subject="the gradient norm")
        else:
            yield bad(kind, item.channel, item.split, text)


def worse(view: RunView) -> Iterator[Finding]:
    """Losses that rose, and evaluations that left the training loss behind; the largest first."""
    found = [trend for trend in view.trends if trend.is_bad]
    for trend in sorted(found, key=lambda trend: -trend.rise.change):
        rise, forgotten = trend.rise, _forgotten(trend, found)
        kind = "worse" if forgotten else trend.state
        if trend.state == "overfitting":
            text = (
                f"{forgotten or 'overfitting'}: no lower than {rise.low:.4f} at step "
                f"{rise.low_step:,}, while its ratio to the training loss more than doubled"
            )
        else:
            text = (
                f"worse since step {rise.low_step:,} ({_nats(rise.last - rise.low)}{_bar(trend)}), "
                f"from {rise.low:.4f} to {rise.last:.4f}{_context(trend, forgotten)}"
            )
        yield bad(kind, trend.channel, trend.split, text)
    if found:
        yield from _by_chance(len(view.trends))


def worse_than_first(view: RunView) -> Iterator[Finding]:
    """Losses that are above those of the first run; the largest difference first."""
    worse = [versus for versus in view.versus if versus.is_worse]
    for found in sorted(worse, key=lambda found: -found.change):
        low, high = found.change - found.limit, found.change + found.limit
        text = (
            f"worse than in the first run ({view.first_name}) by {found.change:.1%}, between "
            f"{low:.1%} and {high:.1%}, over the last third of their steps, to {found.last_step:,}"
        )
        yield bad("versus", found.channel, found.split, text)
    if worse:
        yield from _by_chance(len(view.versus))


def unknown(view: RunView) -> Iterator[Finding]:
    """Losses of which it cannot be told whether they are worse, and why."""
    for state, reason in _UNKNOWN.items():
        names = [
            f"{subject_of(trend.channel, trend.split)} ({_doubt(trend)})"
            for trend in view.trends
            if trend.state == state
        ]
        if names:
            yield _told("unknown", f"unknown, because {reason}: {listed(names)}")
    if names := _compared(view, is_known=False):
        text = f"unknown whether worse than in {view.first_name}, because there is too much noise, "
        yield _told("unknown", f"{text}or there are too few values: {listed(names)}")
    if not view.run.channels():
        text = "unknown which channel, because the log names none; --channel does, see analysis.md"
        yield _told("unknown", text)


def not_worse(view: RunView) -> Iterator[Finding]:
    """Losses that are not worse, and how this is known."""
    names = [subject_of(t.channel, t.split) for t in view.trends if t.state == "steady"]
    ruled_out = "a rise by a twentieth is ruled out"
    if names:
        text = f"not worse, because it is at its lowest, or {ruled_out}: {listed(names)}"
        yield _told("good", text)
    if names := _compared(view, is_known=True):
        text = f"not worse than in {view.first_name}, because {ruled_out}: {listed(names)}"
        yield _told("good", text)


def _by_chance(count: int) -> Iterator[Finding]:
    """How many of so many losses that did not change are called worse."""
    if LEVEL * count >= 1:
        text = f"of {count:,} losses, noise alone makes about {LEVEL * count:.0f} look worse"
        yield Finding(kind="trend", level="unknown", text=text, word="chance")


def _told(level: str, text: str) -> Finding:
    return Finding(kind="trend", level=level, text=text)


def _when_not_finite(item: NonFinite) -> tuple[str, str]:
    if not item.is_final:
        values = f"{item.num_values:,} value{'' if item.num_values == 1 else 's'}"
        return "nonfinite", f"{item.word} in {values}, first at step {item.first_step:,}"
    text = f"{item.word} since step {item.first_step:,}"
    if item.last_step is not None:
        text += f"; the last number was {item.last:.4f} at step {item.last_step:,}"
    return "nan", text


def _first_channels(view: RunView) -> str:
    channels = [item for item in view.nonfinite_losses if item.channel != GLOBAL]
    if not channels:
        return ""
    step = min(item.first_step for item in channels)
    first = [subject_of(i.channel, i.split) for i in channels if i.first_step == step]
    return f"; first in {listed(first)}, at step {step:,}"


def _forgotten(trend: Trend, found: Sequence[Trend]) -> str:
    """Why the whole run is worse, if each channel that is worse in this split was forgotten."""
    channels = [other for other in found if other.channel and other.split == trend.split]
    if trend.channel or trend.split == "train" or not all(map(_is_forgotten, channels)):
        return ""
    names = [subject_of(other.channel) for other in channels]
    return f"forgetting of {listed(names)}" if names else ""


def _is_forgotten(trend: Trend) -> bool:
    return trend.shares is not None and trend.shares[1] < trend.shares[0] / 2


def _context(trend: Trend, forgotten: str) -> str:
    """What training did in the meantime, and what this means."""
    if trend.split == "train":
        return _while("the loss of the whole run", trend.whole)
    if trend.shares is not None and _is_forgotten(trend):
        before, since = (f"{share:.1%}" for share in trend.shares)
        return f"; it had {since} of the training since then, and {before} before: forgetting"
    if trend.in_mix:
        fell = trend.training is not None and trend.training < 0
        why = f": {forgotten or 'overfitting'}"
        return _while("the training loss", trend.training) + (why if fell else "")
    return _while("the training loss of the whole run", trend.whole) + "; it is not trained on"


def _while(what: str, change: float | None) -> str:
    if change is None:
        return ""
    return f", while {what} {'rose' if change > 0 else 'fell'} by {abs(change):.4f}"


def _compared(view: RunView, *, is_known: bool) -> list[str]:
    """The losses that are not worse than in the first run, or of which this is unknown."""
    return [
        f"{subject_of(v.channel, v.split)} ({v.interval})"
        for v in view.versus
        if v.is_known == is_known and not v.is_worse
    ]


def _doubt(trend: Trend) -> str:
    rise = trend.rise
    if trend.state == "zero":
        return f"0 in the last {trend.num_zeros:,} values"
    if trend.num_values == 1:
        return "1 value"
    since = f"{_nats(rise.last - rise.low)} since step {rise.low_step:,}"
    if rise.last == rise.low:
        since = "now at its lowest"
    if trend.num_values < MIN_VALUES:
        return f"{trend.num_values} values, {since}{_bar(trend)}"
    return f"{since}, the last third {rise.change:+.2f} \u00b1 {rise.limit:.2f}"


def _bar(trend: Trend) -> str:
    """What the error bars of the log say of a rise, if it is judged by them."""
    if trend.num_values >= MIN_VALUES or math.isinf(trend.rise.limit):
        return ""
    return f" \u00b1 {trend.rise.limit:.2g} by its error bars"


def _nats(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.1 else f"{value:+.2g}"
