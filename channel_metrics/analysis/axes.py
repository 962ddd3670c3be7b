"""Labels of records beside the channel: names with a "/" in a log that are no channels.

A session with axes logs `domain/target_loss` beside `bbu_loss`. Its channels hold every token once,
and each axis holds every token again. So names below one prefix are labels of an axis if they hold
all tokens by themselves, and the other names do, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from channel_metrics.analysis.readers.keys import GLOBAL, Key
from channel_metrics.analysis.report.moving import values_at
from channel_metrics.core.axis_settings import CHANNEL
from channel_metrics.errors import ChannelMetricsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.store import Steps, Values

__all__ = [
    "axis_of",
    "check_axis",
    "labels_of_channels",
    "meanings_shown",
    "note_of",
    "with_axis",
    "without_labels",
]

# The axes of the groups that names such as `code/python` show.
_TREES = ("tree", "tree_mean")
# Shares are rounded in some logs, and steps of a resume may have other axes.
_TOLERANCE = 0.01
_NEARLY_ALL = 0.95
# Labels of the same tokens have the same loss; losses are rounded in some logs.
_SAME_LOSS = 1e-3
# How the note about labels ends.
_OPTION = " shows them"


def axis_of(name: str) -> str:
    """What stands before the first "/" of a name; empty if it has none."""
    return name.partition("/")[0] if "/" in name else ""


def without_labels(run: Run, declared: Container[str] = ()) -> Run:
    """`run` with labels of axes in `labels`, no longer among its channels; a note names the axes.

    declared: names that are channels.
    """
    meanings = {key: _tree_mean(means) for key, means in run.meanings.items()}
    found = replace(run, meanings=meanings)
    if not any(map(axis_of, found.channels())):
        return run
    axes = _axes(found, declared)
    labels = {key: means for key, means in meanings.items() if axis_of(means.channel) in axes}
    if not labels:
        return run
    run.problems.note(note_of(axes))
    return replace(run, meanings=meanings_shown(meanings, axes), labels=labels)


def labels_of_channels(run: Run) -> dict[str, set[str]]:
    """{channel: labels such as `domain/target`} with which the channel is crossed.

    With `cross: [[channel, domain]]`, a log has `channel.domain/bbu.target_loss`.
    """
    found: dict[str, set[str]] = defaultdict(set)
    channels = sorted(run.channels(), key=len, reverse=True)
    for name in {means.channel for means in run.labels.values()}:
        axis, _, label = name.partition("/")
        first, _, others = axis.partition(".")
        for channel in channels if first == CHANNEL and others else ():
            if label.startswith(f"{channel}."):
                found[channel].add(f"{others}/{label.removeprefix(f'{channel}.')}")
                break
    return found


def with_axis(run: Run, axis: str) -> Run:
    """`run` with the labels of an axis in place of its channels.

    Raises:
        ChannelMetricsError: if the log has no such axis.
    """
    check_axis(axis, run.axes, run.name)
    notes = [note for note in run.problems.notes if not note.endswith(_OPTION)]
    notes.append(
        f"labels of the axis {axis} stand in place of the channels; the configured mix and the "
        "self-check are left out, because they are about channels"
    )
    if _overlap(run, axis):
        notes.append(f"labels of the axis {axis} overlap, so their shares add up to more than 1")
    return replace(
        run,
        problems=replace(run.problems, notes=notes),
        meanings=meanings_shown(run.meanings | run.labels, run.axes, axis),
        labels={},
        ratios={},
        records={},
        axis=axis,
    )


def _overlap(run: Run, axis: str) -> bool:
    """Whether the labels of an axis hold more tokens than the channels, at any step."""
    every = replace(run, meanings=run.meanings | run.labels)
    labels = [name for name in every.channels() if axis_of(name) == axis]
    tokens = _Tokens(every, [run.channels(), labels])
    return tokens.are_more(labels, run.channels())


def check_axis(axis: str, axes: Sequence[str], name: str) -> None:
    """Raise `ChannelMetricsError` if `axis` is none of the axes of the run with this name."""
    if axis not in axes:
        has = f"has {', '.join(axes)}" if axes else "has labels of no axis"
        raise ChannelMetricsError(f"expected an axis of {name}, but got {axis!r}; its log {has}.")


def meanings_shown(
    meanings: Mapping[str | Key, Key], axes: Container[str], axis: str = ""
) -> dict[str | Key, Key]:
    """The meanings without labels of `axes`, or with those of one axis in place of the channels."""
    told = {key: _tree_mean(means) for key, means in meanings.items()}
    if not axis:
        return {key: means for key, means in told.items() if axis_of(means.channel) not in axes}
    return {
        key: means._replace(channel=means.channel.removeprefix(f"{axis}/"))
        for key, means in told.items()
        if means.channel == GLOBAL or axis_of(means.channel) == axis
    }


def note_of(axes: Sequence[str]) -> str:
    """A note about labels that are not shown."""
    word = "axis" if len(axes) == 1 else "axes"
    return f"labels of the {word} {', '.join(axes)} are left aside; --axis {axes[0]}{_OPTION}"


def _axes(run: Run, declared: Container[str]) -> list[str]:
    """The prefixes of names that are labels."""
    names = run.channels()
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[axis_of(name)].append(name)
    trees = [axis for axis in _TREES if axis in groups and _are_groups(groups[axis], names)]
    for axis in trees:
        del groups[axis]
    tokens = _Tokens(run, list(groups.values()))
    axes = [
        axis
        for axis, own in groups.items()
        if axis and not any(name in declared for name in own) and tokens.are_all(own)
    ]
    kept = [name for axis, own in groups.items() if axis not in axes for name in own]
    # A session logs its channels first.
    while axes and not tokens.are_those_of(kept, [groups[axis] for axis in axes]):
        kept += groups[axes.pop(0)]
    return axes + trees


def _are_groups(names: Iterable[str], channels: Iterable[str]) -> bool:
    """Whether each `tree/code` stands beside names such as `code/python`."""
    groups = [name.partition("/")[2] for name in names]
    return all(any(name.startswith(f"{group}/") for name in channels) for group in groups)


class _Tokens:
    """Adds up the tokens of names, relative to those of all channels.

    If the log has no shares, the largest sum of a group is taken for all tokens of a step. Then
    equal sums may be chance, so losses are compared, too.

    groups: names with the same prefix.
    """

    def __init__(self, run: Run, groups: Sequence[Sequence[str]]) -> None:
        self._run = run
        self._split = "train" if run.channels("train") else "eval"
        names = [name for group in groups for name in group]
        self._has_shares = any(run.has(name, "share", self._split) for name in names)
        self._metric = "share" if self._has_shares else "tokens"
        every = [self._series(name, self._metric)[0] for name in names]
        self._steps: Steps = np.unique(np.concatenate([np.empty(0, np.int64), *every]))
        self._whole = np.ones(len(self._steps))
        if not self._has_shares:
            self._whole = np.max([self._sum(group) for group in groups], axis=0, initial=0)

    def are_all(self, names: Sequence[str]) -> bool:
        """Whether these names hold all tokens, or more, at nearly all steps that have any."""
        sums = self._sum(names)
        return _nearly_all((sums >= self._whole * (1 - _TOLERANCE))[sums > 0])

    def are_more(self, names: Sequence[str], others: Sequence[str]) -> bool:
        """Whether these names hold more than the others at any step."""
        return bool((self._sum(names) > self._sum(others) * (1 + _TOLERANCE)).any())

    def are_those_of(self, kept: Sequence[str], groups: Sequence[Sequence[str]]) -> bool:
        """Whether `kept` holds all tokens, and none twice, at nearly all steps of each group."""
        sums = self._sum(kept)
        same = np.abs(sums - self._whole) <= self._whole * _TOLERANCE
        for group in groups:
            own = self._sum(group) > 0
            if not _nearly_all(same[own]):
                return False
            if not self._has_shares and not self._have_one_loss(kept, group):
                return False
        return True

    def _have_one_loss(self, kept: Sequence[str], group: Sequence[str]) -> bool:
        with np.errstate(invalid="ignore"):  # steps without any of these names
            losses = [self._sum(names, "loss") / self._sum(names) for names in (kept, group)]
        known = np.isfinite(losses[0]) & np.isfinite(losses[1])
        off = np.abs(losses[1] - losses[0])[known]
        return not known.any() or _nearly_all(off <= _SAME_LOSS * np.abs(losses[0][known]))

    def _sum(self, names: Sequence[str], times: str = "") -> Values:
        """The sum over `names` at each step; of the counts, or of counts times another metric."""
        total = np.zeros(len(self._steps))
        for name in names:
            steps, counts = self._series(name, self._metric)
            if times:
                counts = counts * values_at(steps, *self._series(name, times))
            total[np.searchsorted(self._steps, steps)] += np.nan_to_num(counts)
        return total

    def _series(self, name: str, metric: str) -> tuple[Steps, Values]:
        return self._run.series(name, metric, self._split)


def _nearly_all(found: NDArray[np.bool_]) -> bool:
    return bool(len(found)) and float(found.mean()) >= _NEARLY_ALL


def _tree_mean(means: Key) -> Key:
    """The meaning of a key such as `tree_mean/code_loss`. A loss alone makes no channel."""
    if means.channel == GLOBAL and means.metric.startswith("tree_mean/"):
        name = means.metric.removesuffix("_loss")
        return means if name == means.metric else Key(means.split, name, "loss")
    return means
