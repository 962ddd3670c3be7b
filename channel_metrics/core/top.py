"""`top`: which channels and labels are shown under their own names. The others are added up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from channel_metrics.core.axes import OTHERS, AxisBook, Moved, Projected
from channel_metrics.core.axis_settings import CHANNEL, TREE
from channel_metrics.core.keys import KeyBook
from channel_metrics.core.labels import UNLABELED
from channel_metrics.errors import ChannelError

__all__ = ["Top"]


class Top:
    """Chooses the channels, and the labels of each axis, that are shown.

    Args:
        limit: how many; 0: all of them.
        always: channels, or `axis/label`, that are shown besides.
        book: the rows.
        keys: the rows of `keys.watched` are shown besides.
        warn_once: is told what is not shown.
    """

    def __init__(
        self,
        limit: int,
        always: Collection[str],
        book: AxisBook,
        keys: KeyBook,
        warn_once: Callable[..., None],
    ) -> None:
        self._limit, self._always = limit, frozenset(map(book.row_of, always))
        self._book, self._keys, self._warn_once = book, keys, warn_once

    def moved(
        self, rows: Projected, totals: Mapping[str, Mapping[str, int]], split: str, prefix: str
    ) -> Moved | None:
        """Which rows are not shown; None if all are.

        Those with the highest totals of training so far are shown. What was not trained on comes
        after them, ranked by this window. In an evaluation, only what it has takes part.

        Raises:
            ChannelError: a channel or a label is called `others`.
        """
        if not self._limit:
            return None
        schema = self._keys.schema
        column = rows.sums[1:, schema.column_names.index(schema.count)]
        counts = dict(zip(rows.names, column.tolist(), strict=True))
        so_far = {row: of_row[f"{schema.count}_total"] for row, of_row in totals.items()}

        def rank(name: str) -> tuple[float, float, str]:
            trained = so_far.get(name, 0)
            return -trained, 0 if trained else -counts[name], name

        groups: dict[str, list[str]] = {}
        for name in rows.names:
            axis, label = self._book.labels.get(name, (CHANNEL, name))
            if label == OTHERS and axis != TREE:
                raise ChannelError(
                    f"{name!r} is the name of what `top` leaves out; rename this channel or label."
                )
            if label != UNLABELED and (split == "train" or counts[name]):
                groups.setdefault(axis, []).append(name)
        moved: dict[str, str | None] = {}
        for axis, members in groups.items():
            ranked = sorted(members, key=rank)
            left = [name for name in ranked[self._limit :] if not self.is_watched(name, prefix)]
            moved |= dict.fromkeys(left, self._others(axis) if left else None)
        self._say(moved)
        return moved or None

    def is_watched(self, row: str, prefix: str) -> bool:
        """Whether something waits for a value of this row."""
        return row in self._always or self._keys.is_watched(row, prefix)

    def _others(self, axis: str) -> str | None:
        if axis == TREE:
            return None  # a group is a part of larger ones, which may be shown
        return OTHERS if axis == CHANNEL else self._book.row(axis, OTHERS)

    def _say(self, moved: Moved) -> None:
        for is_added, what in (
            (True, "counts these channels or labels in `others`"),
            (False, "leaves these groups of names out of the log"),
        ):
            rows = sorted(row for row, other in moved.items() if (other is not None) == is_added)
            if rows:
                self._warn_once(f"`top` (%d) {what}: %s ...", self._limit, ", ".join(rows[:5]))
