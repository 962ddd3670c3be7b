"""A run compared with the first one: means over the last third of their common steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from channel_metrics.analysis.judging.means import difference
from channel_metrics.analysis.judging.trends import LEAST, STEADY, losses_of
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.curves import splits_of

if TYPE_CHECKING:
    from channel_metrics.analysis.judging.means import Difference
    from channel_metrics.analysis.run import Run

__all__ = ["Versus", "versus_of"]


@dataclass(frozen=True, kw_only=True)
class Versus:
    """One loss of a run, compared with that of the first run. All parts are relative to this."""

    channel: str
    """The channel, or `GLOBAL`."""

    split: str
    """`train`, `eval`, `test` or `probe`."""

    change: float
    """The difference of the two means / the first run's mean."""

    limit: float
    """Half the length of its interval. In one of a hundred comparisons, the truth is below it, in
    another one above it. It is infinite if there are too few values."""

    last_step: int
    """The last step that both runs have."""

    @property
    def is_worse(self) -> bool:
        """Whether the loss is higher than that of the first run, by more than noise explains."""
        return self.change > max(self.limit, LEAST)

    @property
    def is_known(self) -> bool:
        """Whether it is worse, or a rise by a twentieth is ruled out."""
        return self.is_worse or self.change + self.limit <= STEADY

    @property
    def interval(self) -> str:
        """The difference with its interval, such as `+1.2% \u00b1 0.5%`."""
        if not math.isfinite(self.limit):
            return "too few values"
        # The sum has no "-0.0%".
        return f"{round(self.change, 3) + 0.0:+.1%} \u00b1 {self.limit:.1%}"


def versus_of(run: Run, first: Run) -> list[Versus]:
    """Every loss that both runs have, the whole run first."""
    found = []
    for split in splits_of(run):
        for channel in (GLOBAL, *run.channels(split)):
            both = (losses_of(run, channel, split), losses_of(first, channel, split))
            if all(len(series[0]) for series in both):
                found.append(_versus(channel, split, difference(*both)))
    return found


def _versus(channel: str, split: str, means: Difference | None) -> Versus:
    known = means is not None and means.level != 0
    return Versus(
        channel=channel,
        split=split,
        change=means.change / abs(means.level) if means and known else math.nan,
        limit=means.limit / abs(means.level) if means and known else math.inf,
        last_step=means.last_step if means else 0,
    )
