"""Percentiles of the mean loss per sequence, from a histogram of fixed bins.

Counts in fixed bins add up over micro-batches and ranks, which percentiles do not. There are eight
bins for each factor of 2, so a percentile is the exact one within 4.5 %. Means below 2^-10 nats are
in the first bin, and those from 32 nats on in the last.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from channel_metrics.core.registry import Column, Metric, Sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BINS", "percentiles", "sequence_bins"]

_PER_OCTAVE, _LOWEST, _HIGHEST = 8, -10, 5
_NUM_BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2
BINS = tuple(f"loss_bin_{number:03}" for number in range(_NUM_BINS))
"""The columns of the histogram, in the order of the losses. They are next to each other."""


def percentiles() -> list[Column | Metric]:
    """The columns and metrics. They need the column `loss_n` of the error bars."""
    columns = [
        Column(
            name, "sequences", "sequences with a mean loss in this bin", optional=True, whole=True
        )
        for name in BINS
    ]
    metrics = [
        Metric(
            f"loss_p{percent}",
            ("tokens", "nonfinite", "loss_n", *BINS),
            partial(_percentile, percent),
            unit="nats",
            doc=f"{percent} % of the sequences have a mean loss up to this one, within 4.5 %",
            cost="one scatter",
        )
        for percent in (10, 50, 90)
    ]
    return [*columns, *metrics]


def sequence_bins(sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The bin of each sequence, int64 [N], and whether it has tokens with a finite loss, bool [N].

    sums: {column: [N]}, with `loss_n` and `nll`.
    """
    used = sums["loss_n"] > 0
    mean = sums["nll"] / sums["loss_n"].clamp(min=1)
    # The lowest finite value stands for the logarithm of 0.
    place = ((mean.log2() - _LOWEST) * _PER_OCTAVE).floor() + 1
    return place.nan_to_num(nan=0).clamp(0, _NUM_BINS - 1).long(), used


def _percentile(percent: int, sums: Sums) -> float | None:
    if sums["loss_n"] != sums["tokens"] - sums["nonfinite"]:
        return None  # some tokens came without their whole sequence
    counts = [sums[name] for name in BINS]
    rank = math.ceil(percent / 100 * sum(counts))
    seen = 0.0
    for number, count in enumerate(counts):
        seen += count
        if count and seen >= rank:
            return _middle(number)
    return None


def _middle(number: int) -> float:
    """The middle of a bin; of the first and the last, the end that is known."""
    place = min(max(number - 0.5, 0.0), _NUM_BINS - 2.0)
    return float(2.0 ** (_LOWEST + place / _PER_OCTAVE))
