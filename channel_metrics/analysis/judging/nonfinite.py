"""Losses that are NaN or infinite: from which step, and which channel first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.curves import splits_of
from channel_metrics.analysis.rows import loss_metric

if TYPE_CHECKING:
    from channel_metrics.analysis.run import Run

__all__ = ["GRADIENT", "NonFinite", "nonfinite_of"]

GRADIENT = "grad_norm"


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """A loss that is NaN or infinite in places, or missing because all its tokens are."""

    channel: str
    """The channel, or `GLOBAL`."""

    split: str
    """`train`, `eval`, `test` or `probe`."""

    metric: str
    """`loss` or `grad_norm`."""

    word: str
    """`NaN` or `infinite`."""

    first_step: int
    """The first step without a finite value. If it never came back, the first one of the end."""

    num_values: int
    """The number of such steps."""

    is_final: bool
    """Whether it lasts to the end."""

    last_step: int | None
    """The step of the last finite value."""

    last: float
    """The last finite value; NaN if there is none."""


def nonfinite_of(run: Run) -> list[NonFinite]:
    """All losses that are not finite, the first one first, channels before the whole run.

    A gradient that is not finite to the end counts, too, because a trainer may write a loss of 0
    for NaN.
    """
    found = [
        item
        for split in splits_of(run)
        for channel in (*run.channels(split), GLOBAL)
        if (item := _nonfinite(run, channel, split, loss_metric(run, channel, split) or "loss"))
    ]
    gradient = _nonfinite(run, GLOBAL, "train", GRADIENT)
    if gradient and gradient.is_final:
        found.append(gradient)
    return sorted(found, key=lambda item: (not item.is_final, item.first_step))


def _nonfinite(run: Run, channel: str, split: str, metric: str) -> NonFinite | None:
    steps, values = run.series(channel, metric, split)
    finite = np.isfinite(values)
    counted, counts = run.series(channel, "nonfinite", split)
    without = counted[~np.isin(counted, steps) & (counts > 0)] if channel else counted[:0]
    bad = np.union1d(steps[~finite], without)
    if not len(bad):
        return None
    good = steps[finite]
    is_final = not len(good) or bool(good[-1] < bad[-1])
    since = bad[bad > good[-1]] if is_final and len(good) else bad
    return NonFinite(
        channel=channel,
        split=split,
        metric="loss" if metric != GRADIENT else GRADIENT,
        word="infinite" if np.isinf(values).any() and not np.isnan(values).any() else "NaN",
        first_step=int(since[0]),
        num_values=len(bad),
        is_final=is_final,
        last_step=int(good[-1]) if len(good) else None,
        last=float(values[finite][-1]) if len(good) else math.nan,
    )
