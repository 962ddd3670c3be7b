"""The macro means of `tree`: for a group of names, the mean of its children, which weigh alike."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from channel_metrics.core.axes import AxisBook, Projected, groups_of
from channel_metrics.core.axis_settings import CHANNEL
from channel_metrics.core.names import MARK
from channel_metrics.core.schema import Metric, Schema
from channel_metrics.core.table import values_by_channel

__all__ = ["TreeMeans"]

# The metrics of a channel whose mean is taken.
_MEANS = ("loss", "weighted_loss", "token_acc")


class TreeMeans:
    """Computes them from the sums of all channels.

    Args:
        levels: how many levels of names are added up.
        schema: the columns.
        metrics: those that are logged of a channel.
    """

    def __init__(self, levels: int, schema: Schema, metrics: Sequence[Metric]) -> None:
        self._levels, self._schema = levels, schema
        self._metrics = [metric for metric in metrics if metric.name in _MEANS]
        # The children of the last level may be groups. No channel has a name like these rows.
        self._book = AxisBook({}, tree=levels + 1, form=f"{MARK}{{axis}}={{label}}")

    def of(self, rows: Projected) -> dict[str, dict[str, float]]:
        """{group: {metric: mean}}; a child without a metric takes no part in its mean."""
        if not self._levels or not self._metrics:
            return {}
        size = rows.num_channels
        names, sums, num_channels = self._book.project(rows.names[:size], rows.sums[: size + 1])
        children: dict[str, list[dict[str, float]]] = {}
        values = values_by_channel(self._schema, names, sums, self._metrics, num_channels)
        for row, of_row in values.items():
            _, name = self._book.labels.get(row, (CHANNEL, row))
            parents = groups_of(name)
            if 0 < len(parents) <= self._levels:
                children.setdefault(parents[-1], []).append(of_row)
        found = {}
        for group, of in children.items():
            lists = {m.name: [row[m.name] for row in of if m.name in row] for m in self._metrics}
            found[group] = {name: fmean(of_name) for name, of_name in lists.items() if of_name}
        return found
