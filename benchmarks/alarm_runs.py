"""Simulated runs for the observer of alerts, in which nothing is wrong, and runs with one fault.

Each window draws 64 records at the stated ratios: 1 to `channels` parts, the last one rare, so that
it is absent from most windows. A record has 1 to 400 tokens or so: the standard deviation of the
lengths is 1.3 times their mean. Losses are 2 nats with a noise of 0.02 per window and channel.

In the runs with a fault, windows have 64 records, too. A channel ends, or its share is off.
"""

from __future__ import annotations

import random
from itertools import accumulate, count
from typing import Any

from channel_metrics.acting import Budget
from channel_metrics.alerting import KINDS, Alerts
from channel_metrics.config import MetricsConfig
from channel_metrics.core.labels import UNLABELED
from channel_metrics.observers.alerts import Alert, AlertObserver, rates
from channel_metrics.observers.window_alerts import shares, starved
from channel_metrics.session import ChannelMetrics
from channel_metrics.windows import Window

__all__ = ["false_alerts", "share_delay", "starved_delay"]

_RECORDS = 64
_NOISE = 0.02
_BEFORE = 300


class _Kept(AlertObserver):
    """Keeps what it would tell."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kinds: list[str] = []

    def _tell(self, alert: Alert) -> None:
        self.kinds.append(alert.kind)


def false_alerts(run: int, channels: int, windows: int, unit: str) -> list[str]:
    """The kinds of the alerts of one run. unit: of the shares, `samples` or `tokens`."""
    names = [f"c{n}" for n in range(channels)]
    ratios = {name: float(n + 1) for n, name in enumerate(names)} | {names[-1]: 0.05}
    # The limit of `share` is so low that the test alone decides. The file is never written.
    alerts = {"to": [], "file": "alerts.jsonl", "share": 1e-6, "cooldown": 0}
    config = MetricsConfig(alerts=alerts, budget={"ratios": ratios, "unit": unit})
    session = ChannelMetrics(config)
    (given,) = session.on_window
    assert isinstance(given, AlertObserver)
    observer = _Kept(config, given.settings, {}, session)
    draw, totals = random.Random(f"{unit} {run}"), {name: [0, 0] for name in names}
    weights = list(accumulate(ratios.values()))
    for step in range(1, windows + 1):
        counts = dict.fromkeys(names, 0)
        for name in draw.choices(names, cum_weights=weights, k=_RECORDS):
            size = max(1, round(draw.lognormvariate(4, 1)))
            counts[name] += size
            totals[name][0] += size
            totals[name][1] += 1
        observer(_window(step, counts, totals, session.schema.column_names, draw))
    return observer.kinds


def _window(
    step: int,
    counts: dict[str, int],
    totals: dict[str, list[int]],
    columns: tuple[str, ...],
    draw: random.Random,
) -> Window:
    rows = [(0.0,) * len(columns)]
    for tokens in counts.values():
        sums = {"tokens": float(tokens), "nll": tokens * draw.gauss(2, _NOISE)}
        rows.append(tuple(sums.get(column, 0.0) for column in columns))
    return Window(
        split="train",
        step=step,
        names=tuple(counts),
        num_channels=len(counts),
        columns=columns,
        table=tuple(rows),
        totals={n: {"tokens_total": t, "samples_total": s} for n, (t, s) in totals.items()},
    )


def starved_delay(run: int, channels: int, chance: float, rate: float) -> int:
    """After how many windows without a channel this is found.

    It was in each of 300 windows by this chance. The other channels are in all windows.
    """
    draw, presence = random.Random(f"starved {chance} {run}"), dict[str, list[int]]()
    others = dict.fromkeys([UNLABELED, *(f"c{n}" for n in range(channels - 1))], 1.0)
    for window in count():
        is_there = not window or (window < _BEFORE and draw.random() < chance)
        reasons = starved({**others, "last": float(is_there)}, rates(rate, KINDS)[1], presence)
        if any(reason.text for reason in [*reasons]) and window >= _BEFORE:
            return window - _BEFORE + 1
    raise AssertionError


def share_delay(run: int, target: float, off: float, rate: float, before: int) -> int | None:
    """After how many windows it is found that a share is off its target; None after 10,000.

    before: for so many windows, the records are drawn at the target.
    """
    draw, limit = random.Random(f"share {target} {off} {run}"), Alerts().share
    budget, totals = Budget(ratios={"a": target, "b": 1 - target}), dict.fromkeys("ab", 0)
    for window in range(before + 10_000):
        own = target + (off if window >= before else 0)
        found = sum(draw.random() < own for _ in range(_RECORDS))
        totals["a"] += found
        totals["b"] += _RECORDS - found
        counts = {name: {"samples_total": total} for name, total in totals.items()}
        reasons = shares(counts, lambda _: False, budget, limit, rates(rate, KINDS)[1])
        if any(reason.text for reason in [*reasons]) and window >= before:
            return window - before + 1
    return None
