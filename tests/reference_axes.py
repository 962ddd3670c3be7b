"""The naive oracle of labels: records that have several, groups of names, and objectives.

As `reference`, it shares no code with the library, and loops over lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from reference import Batch, reference_sums, values_of

Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Record:
    """A channel, the losses of its tokens after the first one, and {axis: labels}."""

    channel: str | None
    losses: Sequence[float]
    labels: Mapping[str, Sequence[str]]

    def on(self, axis: str) -> Sequence[str]:
        """Its labels on an axis, of which `channel` is one."""
        if axis == "channel":
            return [self.channel or "unlabeled"]
        return self.labels.get(axis) or ["unlabeled"]


def reference_axis(records: Sequence[Record], *axes: str) -> Values:
    """{label: {metric: value}} of an axis, or of several that are crossed."""
    return _values(
        records, lambda record: map(".".join, product(*(record.on(axis) for axis in axes)))
    )


def reference_top(records: Sequence[Record], shown: Iterable[str], *axes: str) -> Values:
    """An axis of which some labels are shown; a record with any other one counts in `others`."""
    kept = {*shown, "unlabeled"}
    return _values(
        records,
        lambda record: (
            label if label in kept else "others"
            for label in map(".".join, product(*(record.on(axis) for axis in axes)))
        ),
    )


def reference_tree(records: Sequence[Record], levels: int) -> Values:
    """{group: {metric: value}} over all tokens below each group: the micro mean."""
    return _values(records, lambda record: _groups(record.channel, levels))


def reference_tree_means(records: Sequence[Record], levels: int) -> dict[str, float]:
    """{group: the mean of the losses of its children}, the macro mean.

    Children are channels and groups. Those of the last level may be groups of one level more.
    """
    named = [
        *reference_axis(records, "channel").items(),
        *reference_tree(records, levels + 1).items(),
    ]
    found = {}
    for group in reference_tree(records, levels):
        losses = [v["loss"] for name, v in named if name.rpartition("/")[0] == group]
        if losses:
            found[group] = math.fsum(losses) / len(losses)
    return found


def reference_objectives(
    records: Sequence[Record], weights: Mapping[str, float]
) -> dict[str, float]:
    """{objective: value} over the channels that have a loss; `unlabeled` is none."""
    channels = reference_axis(records, "channel")
    losses = {name: v["loss"] for name, v in channels.items() if name != "unlabeled"}
    if not losses:
        return {}
    found = {
        "macro_loss": math.fsum(losses.values()) / len(losses),
        "worst_loss": max(losses.values()),
    }
    if all(name in losses for name in weights):
        parts = math.fsum(weight * losses[name] for name, weight in weights.items())
        found["weighted_loss_of_channels"] = parts / math.fsum(weights.values())
    return found


def _values(records: Sequence[Record], labels: Callable[[Record], Iterable[str]]) -> Values:
    """A record counts once in each of its labels. A share is a part of the tokens of all records,
    so the shares of labels that overlap add up to more than one."""
    counted = [(label, one.losses) for one in records for label in dict.fromkeys(labels(one))]
    batch = Batch(
        losses=[loss for _, own in counted for loss in (0.0, *own)],
        loss_mask=[at for _, own in counted for at in (0.0, *(1.0 for _ in own))],
        channels=[label for label, _ in counted],
        bounds=[0, *accumulate(1 + len(own) for _, own in counted)],
    )
    tokens = sum(len(one.losses) for one in records)
    sums = reference_sums([batch])
    return {label: values_of(own, tokens) for label, own in sums.items() if own.tokens}


def _groups(channel: str | None, levels: int) -> list[str]:
    """The groups that a name such as `code/python/web` is in, at most so many."""
    parts = (channel or "").split("/")
    return ["/".join(parts[:depth]) for depth in range(1, min(levels, len(parts) - 1) + 1)]
