"""Schemas of units other than tokens: preference pairs and completions."""

from __future__ import annotations

from functools import partial
from operator import itemgetter

from channel_metrics.core.schema import Column, Metric, Schema, Sums, ratio

__all__ = ["PAIR_REWARDS", "mean", "pair_rewards", "sample_schema"]

# In the order in which TRL's DPO trainer gathers them.
PAIR_REWARDS = ("chosen", "rejected", "accuracies", "margins")


def sample_schema(unit: str, *entries: Column | Metric) -> Schema:
    """A schema with `samples`, `share`, and these entries. Each unit counts as one sample.

    The config asks for the number of samples by `samples` or `tokens`. Checkpoints keep
    `samples_total`.
    """
    schema = Schema(unit, count="samples")
    schema.register(
        Column("samples", unit, unit, total=True),
        Metric(
            "samples",
            ("samples",),
            itemgetter("samples"),
            unit=unit,
            doc=f"{unit} in the window",
            adds_up=True,
            asked_by=("samples", "tokens"),
        ),
        Metric(
            "share",
            ("samples",),
            partial(_mean_of, "samples", "all"),
            doc=f"{unit} / {unit} of all channels, `unlabeled` among them",
        ),
        *entries,
    )
    return schema


def pair_rewards(trainer: str) -> list[Column | Metric]:
    """What `trainer`, TRL or ms-swift, logs of the rewards of preference pairs."""
    entries: list[Column | Metric] = []
    for name in PAIR_REWARDS:
        units = ("pairs", "") if name == "accuracies" else ("rewards", "rewards")
        doc = f"what {trainer} logs as rewards/{name}"
        entries += [Column(name, units[0], doc), mean(f"rewards/{name}", name, units[1])]
    return entries


def mean(name: str, column: str, unit: str = "") -> Metric:
    """The mean of a column over the samples, which is always logged, as by the trainer."""
    return Metric(
        name,
        (column, "samples"),
        partial(_mean_of, column, "samples"),
        unit=unit,
        doc=f"{column} / samples",
        always=True,
    )


def _mean_of(column: str, count: str, sums: Sums) -> float | None:
    return ratio(sums[column], sums[count])
