"""Each loss judged by its own past: it is worse, it is not, or this cannot be told.

Evaluations are also judged against training. The loss of the whole run is judged like the others.
What it did in the meantime is told, but it excuses no channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from channel_metrics.analysis.judging.means import MIN_VALUES, Rise, Series, rise_of
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.curves import splits_of
from channel_metrics.analysis.report.moving import values_at
from channel_metrics.analysis.rows import loss_metric

if TYPE_CHECKING:
    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.store import Steps, Values

__all__ = ["LEAST", "STEADY", "Trend", "losses_of", "trends_of"]

# A change of 1 % is what another seed brings. Smaller ones are no finding.
LEAST = 0.01
# A loss is not worse if a rise by a twentieth is ruled out.
STEADY = 0.05
# Evaluation / training: it may change by a third in a healthy run, because training is the mean of
# all steps since the last evaluation, when the loss was higher.
_APART = 2.0
# The loss at a step is the mean over so small a part of the run around it.
_PART = 1 / 18
# The ends of a 95 % interval are so many standard errors away from its middle. With few sequences
# they are further away, and then the error is taken for larger than it is.
_ENDS = 1.96

State = Literal["worse", "overfitting", "steady", "zero", "few", "noisy", "estimated"]


@dataclass(frozen=True, kw_only=True)
class Trend:
    """What became of one loss."""

    channel: str
    """The channel, or `GLOBAL`."""

    split: str
    """`train`, `eval`, `test` or `probe`."""

    state: State
    """`worse`; `overfitting`: it has stopped falling, and training went on; `steady`: not worse.
    `zero`, `few`, `noisy` and `estimated` say why this cannot be told."""

    num_values: int
    """The number of finite values."""

    num_zeros: int
    """How many of the last values are exactly 0."""

    rise: Rise
    """Its rise."""

    in_mix: bool
    """Whether it has a training loss of its own, or no channel of the log has one."""

    training: float | None = None
    """For evaluations: the change of the training loss since the lowest one, in nats. If the
    channel has none, it is that of the whole run."""

    whole: float | None = None
    """For channels: the change of the training loss of the whole run since their lowest loss."""

    shares: tuple[float, float] | None = None
    """The channel's share of the training, until its lowest loss and since then."""

    @property
    def is_bad(self) -> bool:
        """Whether it is worse or overfits."""
        return self.state in ("worse", "overfitting")


def trends_of(run: Run) -> list[Trend]:
    """The trend of each loss in the log, the whole run first."""
    judge = _Judge(run)
    return [
        judge.trend(channel, split)
        for split in splits_of(run)
        for channel in (GLOBAL, *run.channels(split))
        if len(losses_of(run, channel, split)[0])
    ]


def losses_of(run: Run, channel: str, split: str) -> Series:
    """The finite losses of a channel, with their tokens, and their errors if intervals are logged.

    The intervals of estimates (`loss_estimate_high`) are not taken: estimates are smooth, so that
    their values depend on each other.
    """
    metric = loss_metric(run, channel, split) or "loss"
    steps, losses = run.series(channel, metric, split)
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    counts = run.series(channel, "tokens", split)
    weights = np.nan_to_num(values_at(steps, *counts)) if len(counts[0]) else None
    errors = None
    if run.has(channel, "loss_high", split):
        # The low end of an interval stops at 0.
        high = values_at(steps, *run.series(channel, "loss_high", split))
        errors = (high - losses) / _ENDS
    return Series(steps, losses, weights, errors)


class _Judge:
    """Judges the losses of one run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._whole = losses_of(run, GLOBAL, "train")
        counts = [_counts(losses_of(run, name, "train")) for name in run.channels("train")]
        steps, tokens = (
            np.concatenate([np.empty(0), *(part[i] for part in counts)]) for i in range(2)
        )
        order = np.argsort(steps, kind="stable")
        self._mix = steps[order], tokens[order]

    def trend(self, channel: str, split: str) -> Trend:
        """The trend of a loss that has finite values."""
        own = losses_of(self._run, channel, split)
        rise = rise_of(own)
        num_zeros = int(np.logical_and.accumulate(own.values[::-1] == 0).sum())
        trained = losses_of(self._run, channel, "train")
        partner = trained if len(trained[0]) else self._whole
        is_evaluated = split != "train"
        if loss_metric(self._run, channel, split) == "loss_estimate":
            # Its values are smooth, so its noise cannot be read off them.
            state: State = "estimated"
        elif num_zeros >= MIN_VALUES:
            # Trainers log 0 for NaN, or where no token is supervised.
            state = "zero"
        else:
            is_stuck = is_evaluated and _leaves_training(own, partner, rise)
            state = _state(rise, is_stuck)
        return Trend(
            channel=channel,
            split=split,
            state=state,
            num_values=len(own.values),
            num_zeros=num_zeros,
            rise=rise,
            in_mix=bool(len(trained[0])) or not self._run.channels("train"),
            training=_change(partner, rise.low_step) if is_evaluated else None,
            whole=_change(self._whole, rise.low_step) if channel != GLOBAL else None,
            shares=self._shares(trained, rise.low_step) if channel != GLOBAL else None,
        )

    def _shares(self, trained: Series, step: int) -> tuple[float, float] | None:
        """A channel's part of the tokens up to a step and after it; without tokens, of values."""
        part, whole = (_split_at(step, *counts) for counts in (_counts(trained), self._mix))
        return (part[0] / whole[0], part[1] / whole[1]) if all(whole) else None


def _state(rise: Rise, is_stuck: bool) -> State:
    if math.isinf(rise.limit):
        return "few"
    # The loss of some trainers is below 0.
    size = abs(rise.level)
    at_lowest = rise.last - rise.low <= LEAST * size
    if rise.change > max(rise.limit, LEAST * size) and not at_lowest:
        return "worse"
    if is_stuck:
        return "overfitting"
    # The end is looked at, too, because a channel may have most of its tokens before.
    highest = max(rise.change + rise.limit, rise.last - rise.level)
    return "steady" if at_lowest or highest <= STEADY * size else "noisy"


def _leaves_training(own: Series, trained: Series, rise: Rise) -> bool:
    """Whether an evaluation has stopped falling, and its ratio to the training loss doubled."""
    steps, losses, *_ = own
    if rise.low_step == steps[-1] or rise.change < -rise.limit:
        return False
    firsts = [-1, *steps.tolist()]
    since_last = [_mean(trained, *ends) for ends in zip(firsts, steps.tolist(), strict=False)]
    ratios = losses / np.array(since_last)
    known = np.isfinite(ratios) & (ratios > 0)
    if not known.any():
        return False
    apart = rise_of(Series(steps[known], np.log(ratios[known])))
    return apart.change > max(apart.limit, math.log(_APART))


def _change(series: Series, step: int) -> float | None:
    """The last loss minus that at a step."""
    steps = series[0]
    if not len(steps):
        return None
    last, near = int(steps[-1]), int(_PART * (steps[-1] - steps[0]))
    change = _mean(series, last - near - 1, last) - _mean(series, step - near - 1, step + near)
    return change if math.isfinite(change) else None


def _mean(series: Series, after: int, until: int) -> float:
    """The mean loss of these steps, weighted by tokens; NaN if there is none."""
    steps, losses, *_ = series
    inside = slice(*np.searchsorted(steps, (after, until), side="right"))
    weight = _counts(series)[1][inside]
    return float((losses[inside] * weight).sum() / weight.sum()) if weight.sum() else math.nan


def _counts(series: Series) -> tuple[Steps, Values]:
    steps, _, weights, _ = series
    return steps, np.ones(len(steps)) if weights is None else weights


def _split_at(step: int, steps: Steps, counts: Values) -> tuple[float, float]:
    """The sums up to a step and after it."""
    place = int(np.searchsorted(steps, step, side="right"))
    return float(counts[:place].sum()), float(counts[place:].sum())
