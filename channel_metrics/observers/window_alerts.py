"""Alerts that need no test of a loss: tokens that are not finite, absent channels, shares."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

from channel_metrics.acting import Budget
from channel_metrics.alerting import Alerts
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.schema import Schema
from channel_metrics.windows import Window

__all__ = ["Judged", "Session", "chance_of_absence", "evidence", "new_presence", "window_judged"]

# Records have different lengths, so their tokens count as fewer draws. 4 is right for lengths whose
# standard deviation is 1.7 times their mean.
_RECORDS_PER_DRAW = {"samples": 1, "tokens": 4}


@dataclass(frozen=True)
class Judged:
    """What was seen of a channel.

    kind: of the alert. channel: empty for the whole run. is_on: whether there is reason for an
    alert; None between the limit for an alert and the one that ends it. text: the reason. lasts:
    whether it goes on until `is_on` is False.
    """

    kind: str
    channel: str
    is_on: bool | None
    text: str
    lasts: bool = True


class Session(Protocol):
    """What is asked of a `ChannelMetrics`."""

    schema: Schema

    def is_label(self, row: str) -> bool:
        """Whether a row is a label of an axis."""


def new_presence() -> dict[str, list[int]]:
    """What is remembered of channels: [windows, windows with it, absent since, absences]."""
    return {}


def window_judged(
    window: Window,
    session: Session,
    *,
    kinds: Collection[str],
    settings: Alerts,
    rate: float,
    budget: Budget | None,
    presence: dict[str, list[int]],
) -> Iterator[Judged]:
    """What a window shows.

    Args:
        window: of training or of an evaluation.
        session: knows what is counted.
        kinds: those that are watched for.
        settings: the limits.
        rate: of false alerts of absent channels in the whole run, and of shares.
        budget: the ratios and the records of the sources.
        presence: of `new_presence`, which is changed.
    """
    names = window.names[: window.num_channels]
    counts = {name: window.sums(name)[session.schema.count] for name in (UNLABELED, *names)}
    if "nonfinite" in kinds:
        yield from _nonfinite(window, counts)
    if "unlabeled" in kinds:
        share, limit = counts[UNLABELED] / sum(counts.values()), settings.unlabeled
        text = f"{share:.1%} of the {session.schema.unit} of a window have no channel"
        yield Judged("unlabeled", UNLABELED, _between(share, limit), text)
    if window.split != "train":
        return
    if "starved" in kinds:
        yield from _starved(counts, rate, presence)
    if budget is not None and "share" in kinds:
        yield from _shares(window, session, budget, settings.share, rate)
    if budget is not None and "exhausted" in kinds:
        yield from _exhausted(window, budget, settings.epochs)


def _between(value: float, limit: float) -> bool | None:
    """Whether a value is above the limit; None if it is above half of it only."""
    return True if value > limit else False if value <= limit / 2 else None


def _nonfinite(window: Window, counts: dict[str, float]) -> Iterator[Judged]:
    for name, count in counts.items():
        sums = window.sums(name)
        bad = sums.get("nonfinite", 0.0) + sums.get("nonfinite_weight", 0.0)
        if count:
            text = f"{bad:,.0f} of {count:,.0f} tokens of a window have no finite loss or weight"
            yield Judged("nonfinite", name, bad > 0, text)


def _starved(
    counts: dict[str, float], rate: float, presence: dict[str, list[int]]
) -> Iterator[Judged]:
    names = [name for name in counts if name != UNLABELED]
    for name in names:
        if name not in presence:
            if counts[name]:
                presence[name] = [1, 1, 0, 0]
            continue
        known = presence[name]
        windows, present, absent, absences = known
        if counts[name]:
            presence[name] = [windows + absent + 1, present + 1, 0, absences + (absent > 0)]
            yield Judged("starved", name, False, "")
            continue
        known[2] = absent = absent + 1
        tests = absences + 1
        chance = chance_of_absence(windows, present, absent)
        # Half of the rate, because a test is made again as the absence goes on.
        allowed = rate / 2 / len(names) / (tests * (tests + 1))
        since = "one window" if absent == 1 else f"{absent:,} windows"
        text = f"no token in {since}; it was in {present:,} of {windows:,} before"
        yield Judged("starved", name, chance < allowed or None, text)


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


def _shares(
    window: Window, session: Session, budget: Budget, limit: float, rate: float
) -> Iterator[Judged]:
    totals = {row: of for row, of in window.totals.items() if not session.is_label(row)}
    unit, parts = f"{budget.unit}_total", sum(budget.ratios.values())
    whole = sum(of_row.get(unit, 0) for of_row in totals.values())
    records = sum(of_row.get("samples_total", 0) for of_row in totals.values())
    if not whole or not records:
        return
    draws = records / _RECORDS_PER_DRAW[budget.unit]
    for row, ratio in budget.ratios.items():
        share, target = totals.get(row, {}).get(unit, 0) / whole, ratio / parts
        is_sure = evidence(share * draws, draws, target) > math.log(len(budget.ratios) / rate)
        is_off = _between(abs(share - target), limit)
        text = f"its share of the {budget.unit} is {share:.1%}, and should be {target:.1%}"
        yield Judged("share", row, is_off if is_sure or not is_off else None, text)


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


def _exhausted(window: Window, budget: Budget, epochs: float) -> Iterator[Judged]:
    for unit, counted in (("records", "samples"), ("tokens", "tokens")):
        for row, size in getattr(budget, unit).items():
            seen = window.totals.get(row, {}).get(f"{counted}_total", 0)
            text = f"{seen:,} {counted} were trained on, of a source of {size:,.0f} {unit}"
            yield Judged("exhausted", row, seen >= epochs * size, text)
