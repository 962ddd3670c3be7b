"""Facts about a run: the final table, gaps, the self-check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.moving import values_at
from channel_metrics.analysis.run import Run

if TYPE_CHECKING:
    from channel_metrics.analysis.store import Steps

__all__ = [
    "Gap",
    "SelfCheck",
    "find_gaps",
    "self_check",
]

# A gap is this many times longer than the usual distance between two windows with the channel.
_GAP_FACTOR = 4.0


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A stretch of the run in which a channel had no tokens."""

    channel: str
    first_step: int
    """The last step before the gap, or the first step of the run."""
    last_step: int
    """The first step after the gap, or the last step of the run."""
    windows: int
    """The number of logged windows in the gap."""


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """Compares the token-weighted mean of the channels to the loss that the trainer logged."""

    windows: int
    """The number of windows that could be compared."""
    largest: float
    """The largest relative difference."""
    median: float
    """The median of the relative differences."""
    step: int
    """The step of the largest difference."""


def find_gaps(run: Run) -> list[Gap]:
    """Stretches without a channel that are unusually long for it; the longest first."""
    windows = np.unique(
        np.concatenate([np.empty(0, np.int64), *(_present(run, n) for n in run.channels("train"))])
    )
    found = []
    for name in run.channels("train"):
        present = np.isin(windows, _present(run, name)).nonzero()[0]
        if not len(present):
            continue
        edges = np.concatenate([[-1], present, [len(windows)]])
        missing = np.diff(edges) - 1
        # If a window has the channel with probability p, n windows lack it with (1 - p)^n.
        usual = len(windows) / len(present)
        limit = _GAP_FACTOR * usual
        for index in (missing >= limit).nonzero()[0]:
            first, last = int(edges[index]), int(edges[index + 1])
            found.append(
                Gap(
                    channel=name,
                    first_step=int(windows[max(first, 0)]),
                    last_step=int(windows[min(last, len(windows) - 1)]),
                    windows=int(missing[index]),
                )
            )
    return sorted(found, key=lambda gap: -gap.windows)


def self_check(run: Run) -> SelfCheck | None:
    """Compare Σ loss·tokens / Σ tokens with the trainer's loss; None if the log lacks one of them.

    They are equal if a window is one step. For several steps, most trainers log the mean of the
    means of the steps, which differs a little. Labels of an axis are not checked: a token may have
    several, or none.
    """
    if run.axis:
        return None
    steps, losses = run.series(GLOBAL, "loss")
    nll, tokens, tokens_without_loss = (np.zeros(len(steps)) for _ in range(3))
    for name in run.channels("train"):
        counts = values_at(steps, *run.series(name, "tokens"))
        values = values_at(steps, *run.series(name, "loss"))
        counted = np.where(np.isfinite(counts), counts, 0.0)
        usable = np.isfinite(values)
        nll += np.where(usable, values, 0.0) * counted
        tokens += np.where(usable, counted, 0.0)
        tokens_without_loss += np.where(usable, 0.0, counted)
    good = (tokens > 0) & (tokens_without_loss == 0) & np.isfinite(losses) & (losses != 0)
    if not good.any():
        return None
    off = np.abs(nll[good] / tokens[good] - losses[good]) / np.abs(losses[good])
    worst = int(off.argmax())
    return SelfCheck(
        windows=int(good.sum()),
        largest=float(off[worst]),
        median=float(np.median(off)),
        step=int(steps[good][worst]),
    )


def _present(run: Run, name: str) -> Steps:
    """The steps at which a channel had tokens; if they are not logged, those with a loss."""
    metrics = [m for m in ("tokens", "samples", "loss") if run.has(name, m)]
    steps, values = run.series(name, metrics[0] if metrics else "loss")
    return steps if metrics[:1] == ["loss"] else steps[values > 0]
