"""Alerts that need no test of a loss: tokens that are not finite, absent channels, shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from channel_metrics.acting import Budget
from channel_metrics.core.labels import UNLABELED
from channel_metrics.windows import Window

__all__ = [
    "Reason",
    "chance_of_absence",
    "evidence",
    "exhausted",
    "nonfinite",
    "shares",
    "starved",
    "unlabeled",
]

# Records have different lengths, so their tokens count as fewer draws. 4 is right for lengths whose
# standard deviation is 1.7 times their mean.
_RECORDS_PER_DRAW = {"samples": 1, "tokens": 4}

Counts = Mapping[str, float]


class Reason(NamedTuple):
    """A reason for an alert. What gives none in a window is well again.

    kind: of the alert. channel: empty for the whole run. text: the reason; empty if it is too weak
    for a new alert, but one that was told goes on.
    """

    kind: str
    channel: str
    text: str


def nonfinite(sums: Mapping[str, Counts], counts: Counts) -> Iterator[Reason]:
    """Tokens without a finite loss or weight."""
    for name, count in counts.items():
        bad = sums[name].get("nonfinite", 0.0) + sums[name].get("nonfinite_weight", 0.0)
        if bad:
            text = f"{bad:,.0f} of {count:,.0f} tokens of a window have no finite loss or weight"
            yield Reason("nonfinite", name, text)
        elif not count:
            yield Reason("nonfinite", name, "")


def unlabeled(counts: Counts, limit: float, unit: str) -> Iterator[Reason]:
    """Too much without a channel. unit: what is counted."""
    share = counts[UNLABELED] / sum(counts.values())
    if share > limit / 2:
        text = f"{share:.1%} of the {unit} of a window have no channel"
        yield Reason("unlabeled", UNLABELED, text if share > limit else "")


def starved(counts: Counts, rate: float, presence: dict[str, list[int]]) -> Iterator[Reason]:
    """Channels that are absent for too long.

    Args:
        counts: of the channels in a train window.
        rate: of false alerts in the whole run.
        presence: {channel: [windows, windows with it, absent since, absences]}, which is changed.
    """
    names = [name for name in counts if name != UNLABELED]
    for name in names:
        known = presence.get(name)
        if known is None:
            if counts[name]:
                presence[name] = [1, 1, 0, 0]
            continue
        windows, present, absent, absences = known
        if counts[name]:
            known[:] = windows + absent + 1, present + 1, 0, absences + (absent > 0)
            continue
        known[2] = absent = absent + 1
        tests = absences + 1
        # Half of the rate, because a test is made again as the absence goes on.
        allowed = rate / 2 / len(names) / (tests * (tests + 1))
        is_sure = chance_of_absence(windows, present, absent) < allowed
        since = "one window" if absent == 1 else f"{absent:,} windows"
        text = f"no token in {since}; it was in {present:,} of {windows:,} before"
        yield Reason("starved", name, text if is_sure else "")


def chance_of_absence(windows: int, present: int, absent: int) -> float:
    """The chance that a channel is in none of the last `absent` windows.

    It was in `present` of the `windows` before. If it is drawn anew for each window, all orders of
    these windows are equally likely, whatever its probability is: C(windows, present) of them
    end so, of C(windows + absent, present). The first window is left out, because the channel is
    only known since then.
    """
    windows, present = windows - 1, present - 1
    missed = windows - present
    below = math.lgamma(windows + absent + 1) - math.lgamma(missed + absent + 1)
    return math.exp(math.lgamma(windows + 1) - math.lgamma(missed + 1) - below)


def shares(
    totals: Mapping[str, Mapping[str, int]],
    is_label: Callable[[str], bool],
    budget: Budget,
    limit: float,
    rate: float,
) -> Iterator[Reason]:
    """Shares of the run so far that are off their targets.

    Args:
        totals: of a train window.
        is_label: whether a row of them is a label of an axis, not a channel.
        budget: has the targets.
        limit: by how much a share may be off.
        rate: of false alerts in the whole run.
    """
    unit, parts = f"{budget.unit}_total", sum(budget.ratios.values())
    channels = [of for row, of in totals.items() if not is_label(row)]
    whole = sum(of.get(unit, 0) for of in channels)
    draws = sum(of.get("samples_total", 0) for of in channels) / _RECORDS_PER_DRAW[budget.unit]
    if not whole or not draws:
        return
    for row, ratio in budget.ratios.items():
        share, target = totals.get(row, {}).get(unit, 0) / whole, ratio / parts
        off = abs(share - target)
        if off <= limit / 2:
            continue
        is_sure = evidence(share * draws, draws, target) > math.log(len(budget.ratios) / rate)
        text = f"its share of the {budget.unit} is {share:.1%}, and should be {target:.1%}"
        yield Reason("share", row, text if off > limit and is_sure else "")


def evidence(count: float, draws: float, target: float) -> float:
    """The logarithm of a bet against a probability, `target`, of `count` of the draws.

    It is the chance of the draws if all probabilities are equally likely beforehand / that under
    the target. If the target is right, this is a martingale with mean 1. So the chance that it is
    ever above 1 / rate, after any number of draws, is at most the rate (Ville's inequality).
    """
    others = draws - count
    if target >= 1:
        return math.inf if others else 0.0
    known = math.lgamma(count + 1) + math.lgamma(others + 1) - math.lgamma(draws + 2)
    return known - count * math.log(target) - others * math.log1p(-target)


def exhausted(window: Window, budget: Budget, epochs: float) -> Iterator[Reason]:
    """Sources of which so many epochs were trained on."""
    for unit, counted in (("records", "samples"), ("tokens", "tokens")):
        for row, size in getattr(budget, unit).items():
            seen = window.totals.get(row, {}).get(f"{counted}_total", 0)
            if seen >= epochs * size:
                text = f"{seen:,} {counted} were trained on, of a source of {size:,.0f} {unit}"
                yield Reason("exhausted", row, text)
