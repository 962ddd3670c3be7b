"""Schemas of units other than tokens: preference pairs and completions."""

from __future__ import annotations

from functools import partial
from operator import itemgetter

from channel_metrics.core.schema import Column, Metric, Schema, Sums, ratio

__all__ = ["mean", "sample_schema"]


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
