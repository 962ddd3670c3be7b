"""Curves beside those of the metrics: the mix so far, what a resume overwrote, any other series."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from channel_metrics.analysis.readers.keys import GLOBAL, Key
from channel_metrics.analysis.report.curves import Curve, charts, own_tokens, pick_points
from channel_metrics.analysis.rows import totals_at
from channel_metrics.core.schema import Metric

if TYPE_CHECKING:
    from channel_metrics.analysis.run import Run

__all__ = ["EPOCHS", "MIX", "mix_curves", "other_curves", "overwritten_curves"]

_MAX_POINTS = 300
_MAX_OTHERS = 400

MIX = Metric(
    "mix",
    ("samples",),
    lambda sums: sums["samples"],
    doc="records / records of all channels since the first step",
    label="Share of the records so far",
)
EPOCHS = Metric(
    "epochs",
    ("samples",),
    lambda sums: sums["samples"],
    unit="epochs",
    doc="records so far / records of the source",
    label="Epochs over each source",
)


def mix_curves(run: Run, channels: Iterable[str], limit: int) -> Iterator[Curve]:
    """The share of each channel in the records so far, and the epochs over its source.

    A curve of epochs needs the size of the source, which `channel-metrics train` writes down.
    """
    trained = run.channels("train")
    logged = [run.series(n, metric)[0] for n in trained for metric in ("samples_total", "samples")]
    steps = np.unique(np.concatenate([np.empty(0, np.int64), *logged]))
    found_totals = {name: totals_at(run, name, "samples", steps) for name in trained}
    totals = {name: found for name, found in found_totals.items() if found is not None}
    whole = sum(totals.values(), np.zeros(len(steps)))
    for name in channels:
        if name not in totals:
            continue
        share = np.divide(totals[name], whole, out=np.full(len(steps), np.nan), where=whole > 0)
        found = [(MIX.name, share)]
        if run.records.get(name):
            found.append((EPOCHS.name, totals[name] / run.records[name]))
        for metric, values in found:
            picked = pick_points(values, min(limit, _MAX_POINTS))
            yield Curve(
                channel=name,
                metric=metric,
                split="train",
                steps=steps[picked],
                values=values[picked],
                tokens=own_tokens(run, name, steps[picked]),
                num_points=len(steps),
            )


def overwritten_curves(run: Run, channels: Iterable[str], limit: int) -> Iterator[Curve]:
    """The values of steps that a resume has done again, for each metric that has a chart."""
    for channel in (GLOBAL, *channels) if run.resumes else ():
        for metric in charts():
            steps, values = run.overwritten(channel, metric.name)
            if not len(steps):
                continue
            picked = pick_points(values, min(limit, _MAX_POINTS))
            # The line is broken where it jumps to the branch of another resume.
            places = np.unique(np.searchsorted(steps[picked], run.resumes))
            places = places[(places > 0) & (places < len(picked))]
            shown = np.where(np.isfinite(values), values, np.nan)[picked]
            yield Curve(
                channel=channel,
                metric=metric.name,
                split="train",
                steps=np.insert(steps[picked], places, steps[picked][places]),
                values=np.insert(shown, places, np.nan),
                tokens=None,
                num_points=len(steps),
                is_overwritten=True,
            )


def other_curves(run: Run, channels: Iterable[str], limit: int) -> Iterator[Curve]:
    """The series that have no chart of their own, those of the whole run first."""
    for key in _others(run, {GLOBAL, *channels}):
        steps, values = run.series(key.channel, key.metric, key.split)
        if not len(steps):
            continue
        picked = pick_points(values, max(5, min(limit, _MAX_POINTS) // 2))
        yield Curve(
            channel=key.channel,
            metric=key.metric,
            split=key.split,
            steps=steps[picked],
            values=np.where(np.isfinite(values), values, np.nan)[picked],
            tokens=None if key.channel == GLOBAL else own_tokens(run, key.channel, steps[picked]),
            num_points=len(steps),
        )


def _others(run: Run, channels: Collection[str]) -> Iterator[Key]:
    """Their keys, all of a metric or none: a metric that has too many channels is left out."""
    ends = ("", "_low", "_high", "_estimate", "_estimate_low", "_estimate_high")
    drawn = {metric.name + end for metric in (*charts(), MIX, EPOCHS) for end in ends}
    keys_of: dict[tuple[bool, str], list[Key]] = defaultdict(list)
    for key in run.keys:
        if key.channel in channels and key.metric not in drawn:
            keys_of[key.channel != GLOBAL, key.metric].append(key)
    room = _MAX_OTHERS
    for _, keys in sorted(keys_of.items(), key=lambda item: item[0][0]):
        if len(keys) <= room:
            room -= len(keys)
            yield from keys
