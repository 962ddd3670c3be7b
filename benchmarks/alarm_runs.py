"""Simulated runs for the observer of alerts, in which nothing is wrong.

Each window draws 64 records at the stated ratios: 1 to `channels` parts, the last one rare, so that
it is absent from most windows. A record has 1 to 400 tokens or so: the standard deviation of the
lengths is 1.3 times their mean. Losses are 2 nats with a noise of 0.02 per window and channel.
"""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

from channel_metrics.config import MetricsConfig
from channel_metrics.observers.alerts import Alert, AlertObserver
from channel_metrics.session import ChannelMetrics
from channel_metrics.windows import Window

__all__ = ["false_alerts"]

_RECORDS = 64
_NOISE = 0.02


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
