"""What a report divides the tokens of its runs by: their channels, or the labels of an axis.

The page has the texts and tables of each grouping, and shows those of one at a time. All names have
one numbering: the channels first, then the labels of each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from channel_metrics.analysis.judging.told import findings_of
from channel_metrics.analysis.report.views import rank_channels, shown, views_of

if TYPE_CHECKING:
    from channel_metrics.analysis.judging.finding import Finding
    from channel_metrics.analysis.report.views import ChannelView, RunView

__all__ = ["Grouping", "groupings_of", "numbered"]

# At most so many labels of an axis; --axis shows all.
_MAX_LABELS = 100


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """The runs, divided in one way."""

    axis: str
    """The axis; empty for channels."""

    views: Sequence[RunView]
    """The runs that have the axis."""

    found: Sequence[Sequence[Finding]]
    """The findings about each of them."""

    names: Sequence[str]
    """Those with the most tokens first."""

    first: int = 0
    """The number of the first name."""

    num_left_out: int = 0
    """The number of names that are not shown."""

    @property
    def numbers(self) -> dict[str, int]:
        """{name: its number}"""
        return {name: number for number, name in enumerate(self.names, self.first)}

    @property
    def title(self) -> str:
        """The axis as it is shown."""
        return shown(self.axis) if self.axis else ""

    @property
    def table(self) -> list[tuple[int, RunView, ChannelView | None]]:
        """The rows of a table: each name in each run. A name that a run lacks has no view."""
        found = {(row.index, view.index): row for view in self.views for row in view.rows}
        return [
            (self.first + place, view, found.get((place, view.index)))
            for place in range(len(self.names))
            for view in self.views
        ]

    @property
    def is_planned(self) -> bool:
        """Whether the mix was configured."""
        return any(row.configured is not None for view in self.views for row in view.rows)

    @property
    def widest(self) -> float:
        """The largest part of the mix, which has the longest bar."""
        parts = [
            part
            for view in self.views
            for row in view.rows
            for part in (row.configured, row.row.share, row.row.record_share)
            if part
        ]
        return max(parts, default=1.0)


def groupings_of(views: Sequence[RunView], found: Sequence[Sequence[Finding]]) -> list[Grouping]:
    """The channels, and the labels of each axis that a run has.

    Args:
        views: the runs with their channels.
        found: the findings about each of them.
    """
    runs = [view.run for view in views]
    of_axes = {
        axis: views_of(runs, axis) for axis in dict.fromkeys(a for r in runs for a in r.axes)
    }
    told = {axis: [findings_of(view) for view in of_axis] for axis, of_axis in of_axes.items()}
    return [
        Grouping(
            axis=axis,
            views=own,
            found=told.get(axis, found),
            names=rank_channels([view.run for view in own]),
        )
        for axis, own in {"": views, **of_axes}.items()
    ]


def numbered(groupings: Sequence[Grouping], limit: int) -> list[Grouping]:
    """The groupings with at most `limit` names each; of an axis at most 100. All are numbered."""
    first = 0
    found = []
    for grouping in groupings:
        names = grouping.names[: min(limit, _MAX_LABELS) if grouping.axis else limit]
        views = [
            replace(view, rows=[row for row in view.rows if row.index < len(names)])
            for view in grouping.views
        ]
        left_out = len(grouping.names) - len(names)
        found.append(
            replace(grouping, names=names, views=views, first=first, num_left_out=left_out)
        )
        first += len(names)
    return found
