"""More than one label per record: its channel, and a label on each axis of the config.

While they travel with the tokens, the labels of a record are one string, its joint name. So
whatever cuts, packs or sorts channels does the same to the labels of all axes, and the tokens are
added up once. When a window is closed, the sums of the joint names are added up per channel and
per label. Only combinations that occur have a joint name.

>>> from channel_metrics.core.axes import AxisBook
>>> from channel_metrics.core.names import joint_name
>>> name = joint_name("bbu", [("domain", "target")])
>>> AxisBook({"domain": ()}).rows(name)
['bbu', 'domain/target']

Letters: J joint names, R rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, NamedTuple

from channel_metrics.core.axis_settings import CHANNEL, TREE, TREE_MEAN, Source, token_source
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.names import split_name, token_label
from channel_metrics.errors import ChannelError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OTHERS", "AxisBook", "Moved", "Projected", "groups_of"]

# The row of what `top` leaves out.
OTHERS = "others"
# {row: the row that shows it; None if none does}. A row that is not in it shows itself.
Moved = Mapping[str, str | None]


class Projected(NamedTuple):
    """Sums per row.

    names: of all rows but the first; those of channels come before those of the axes. sums:
    float64 [R + 1, K]; row 0 is the channel `unlabeled`. num_channels: how many names are
    channels.
    """

    names: tuple[str, ...]
    sums: Tensor
    num_channels: int


class AxisBook:
    """Finds the rows that a joint name belongs to: its channel, and one per axis and label.

    Args:
        axes: {axis: source}. A label comes from the joint name, or from {channel: label}.
        cross: axes to combine; `channel` is the first axis.
        tree: how many levels of names such as `code/python` are added up, from the first on.
        form: the name of a row, built from `{axis}` and `{label}`.
    """

    def __init__(
        self,
        axes: Mapping[str, Source],
        cross: Iterable[Sequence[str]] = (),
        tree: int = 0,
        form: str = "{axis}/{label}",
    ) -> None:
        self.axes, self.cross, self.form = dict(axes), [tuple(names) for names in cross], form
        self.tree = tree
        self._crossed = [".".join(names) for names in self.cross]
        self._of_records = {a: one for a, one in self.axes.items() if not token_source(one)}
        # {row: (axis, label)}
        self.labels: dict[str, tuple[str, str]] = {}
        # Axes on which a record has had several labels.
        self.overlaps: set[str] = set()
        # {whether rows were moved: (names, moved rows, plan)}
        self._plans: dict[bool, tuple[tuple[str, ...], Moved | None, Any]] = {}

    def rows(self, name: str | None) -> list[str]:
        """The rows of a joint name; the first one is its channel, or `unlabeled`.

        The name of a label of single tokens has one row and no channel.
        """
        if of_tokens := token_label(name):
            return [self.row(*of_tokens)]
        channel, own = (None, []) if name is None else split_name(name)
        found = {CHANNEL: [channel or UNLABELED]}
        for axis, source in self._of_records.items():
            if isinstance(source, Mapping):
                labels = [source[channel]] if channel and channel in source else []
            else:
                labels = [label for of, label in own if of == axis]
            found[axis] = labels or [UNLABELED]
            if len(set(labels)) > 1:
                self.overlaps.add(axis)
        rows = [self.row(axis, label) for axis in self._of_records for label in found[axis]]
        for axes, crossed in zip(self.cross, self._crossed, strict=True):
            combined = product(*(found[axis] for axis in axes))
            rows += [self.row(crossed, ".".join(labels)) for labels in combined]
        for group in groups_of(channel or "")[: self.tree]:
            rows.append(self.row(TREE, group))
            self.row(TREE_MEAN, group)  # no channel may have this name
        return [*found[CHANNEL], *dict.fromkeys(rows)]

    def by_axis(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """{axis: {label: value}} from {row: value}."""
        found: dict[str, dict[str, Any]] = {}
        for row, value in values.items():
            axis, label = self.labels[row]
            found.setdefault(axis, {})[label] = value
        return found

    def row(self, axis: str, label: str) -> str:
        """The name of the row of a label; raises `ChannelError` if another label has it."""
        row = self.form.format(axis=axis, label=label)
        known = self.labels.setdefault(row, (axis, label))
        if known != (axis, label):
            raise ChannelError(
                f"the labels {known[1]!r} on the axis {known[0]!r} and {label!r} on the axis "
                f"{axis!r} would both be called {row!r}; choose another axis_format."
            )
        return row

    def row_of(self, name: str) -> str:
        """The row of a channel, or of a label that a setting calls `axis/label`."""
        axis, _, label = name.partition("/")
        known = [*self.axes, *self._crossed, *([TREE, TREE_MEAN] if self.tree else [])]
        return self.form.format(axis=axis, label=label) if label and axis in known else name

    def names(self, names: Iterable[str]) -> list[str]:
        """All rows of these joint names but `unlabeled`: first the channels, then the axes'.

        Raises:
            ChannelError: a channel has the name of a row of an axis.
        """
        channels: dict[str, None] = {}
        others: dict[str, None] = {}
        for name in names:
            rows = self.rows(name)
            if not token_label(name):
                channels[rows.pop(0)] = None
            others |= dict.fromkeys(rows)
        channels.pop(UNLABELED, None)
        for row in channels:
            if row in self.labels:
                axis, label = self.labels[row]
                raise ChannelError(
                    f"channel {row!r} has the name of the label {label!r} on the axis {axis!r}; "
                    "rename one of them, or choose another axis_format."
                )
        return [*channels, *others]

    def project(
        self, names: tuple[str, ...], sums: Tensor, moved: Moved | None = None
    ) -> Projected:
        """Add up the sums of J joint names, float64 [J + 1, K] on the host, per row.

        A joint name counts once in a row, also if several of its labels were moved there.

        Raises:
            ChannelError: as `names`.
        """
        if not self.axes and not self.tree and not moved:
            return Projected(names, sums, len(names))
        cached = self._plans.get(bool(moved))
        if cached is None or cached[:2] != (names, moved):
            cached = self._plans[bool(moved)] = names, moved, self._plan(names, moved or {})
        rows, sources, targets = cached[2]
        added = sums.new_zeros(len(rows) + 1, sums.shape[1])
        added.index_add_(0, targets, sums[sources])
        num_channels = sum(row not in self.labels for row in rows)
        return Projected(tuple(rows), added, num_channels)

    def _plan(self, names: tuple[str, ...], moved: Moved) -> tuple[list[str], Tensor, Tensor]:
        """The rows, and which joint name is added to which row."""
        import torch  # the config and the commands do not wait for it

        def shown(rows: Iterable[str]) -> list[str]:
            found = dict.fromkeys(moved.get(row, row) for row in rows)
            return [row for row in found if row is not None]

        of_unlabeled = self.rows(None)
        rows = shown([*self.names(names), *of_unlabeled[1:]])
        place = {UNLABELED: 0, **{row: i for i, row in enumerate(rows, start=1)}}
        pairs = [(0, place[row]) for row in shown(of_unlabeled)]
        pairs += [(i, place[row]) for i, n in enumerate(names, 1) for row in shown(self.rows(n))]
        sources, targets = torch.tensor(pairs, dtype=torch.int64, device="cpu").unbind(1)
        return rows, sources, targets


def groups_of(channel: str) -> list[str]:
    """The groups that a name such as `code/python/web` is in: `code` and `code/python`."""
    return list(accumulate(channel.split("/")[:-1], "{}/{}".format))
