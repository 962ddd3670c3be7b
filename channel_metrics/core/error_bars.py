"""Error bars: the standard error and the 95 % interval of a mean over tokens.

The tokens of one sequence resemble each other, so sequences are the independent draws, see
`channel_metrics.core.intervals`. It needs squares, which are added up per sequence and would be
wrong for a part of one. If a window has tokens that were counted without their whole sequence, it
has no error bars.

Letters as there: sequence i has n tokens and the sum y of their values. This module does not
import torch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from channel_metrics.core.registry import Column, Metric, Sums

if TYPE_CHECKING:
    from torch import Tensor

    from channel_metrics.core.sums import SequenceView

__all__ = ["error_bars"]

# {column of y: the highest possible mean}
_HIGHEST = {"nll": math.inf, "correct": 1.0}


def error_bars(metric: str, values: str, unit: str, cost: str = "") -> list[Column | Metric]:
    """The columns and metrics of the error bars of `metric`, a mean over tokens.

    Args:
        metric: `loss` or `token_acc`.
        values: the column of y: `nll` or `correct`.
        unit: that of `metric`; empty for a share.
        cost: what `metric` itself costs.
    """
    of_y, parts = unit or "tokens", {}
    for part, part_unit, doc in (
        # The others read it.
        ("n", "tokens", f"n: the tokens of a whole sequence that `{metric}` is the mean of"),
        ("sequences", "sequences", "sequences with n > 0"),
        ("n_squared", "tokens^2", "n * n"),
        ("y_squared", f"{of_y}^2", f"y * y; y is the sum of `{values}` over a sequence"),
        ("y_times_n", f"{of_y} * tokens", "y * n"),
    ):
        parts[part] = Column(
            f"{metric}_{part}",
            part_unit,
            doc,
            per_sequence=partial(_of_sequences, part, metric, values),
            optional=True,
            whole=True,
        )
    counts = ("judged",) if values == "correct" else ("tokens", "nonfinite")
    needs = (values, *counts, *(column.name for column in parts.values()))
    spread = f"sqrt(m / (m - 1) * sum((y - r n)^2)) / sum(n): the standard error of r = `{metric}`"
    limits = "" if _HIGHEST[values] == math.inf else " and at most 1"
    ends = {
        "se": f"{spread} over m sequences, each with n tokens and the sum y of `{values}`",
        "low": f"r - t * `{metric}_se`, at least 0: the lower end of the 95 % interval, t by "
        "Student with m - 1 degrees of freedom",
        "high": f"r + t * `{metric}_se`{limits}: its upper end",
    }
    metrics = [
        Metric(
            f"{metric}_{end}",
            needs,
            partial(_bound, end, metric, values),
            unit=unit,
            doc=doc,
            cost=cost,
        )
        for end, doc in ends.items()
    ]
    return [*parts.values(), *metrics]


def _of_sequences(part: str, metric: str, values: str, view: SequenceView) -> Tensor | None:
    """One value per sequence; None if y was not measured."""
    y = view.sums.get(values)
    if y is None:
        return None
    if part == "n":
        if values == "correct":
            return view.sums["judged"]
        tokens, nonfinite = view.sums["tokens"], view.sums.get("nonfinite")
        return tokens if nonfinite is None else tokens - nonfinite
    n = view.sums[f"{metric}_n"]
    if part == "sequences":
        return n > 0
    first, second = {"n_squared": (n, n), "y_squared": (y, y), "y_times_n": (y, n)}[part]
    return first * second


def _bound(end: str, metric: str, values: str, sums: Sums) -> float | None:
    from channel_metrics.core.intervals import ratio_interval

    n = sums["judged"] if values == "correct" else sums["tokens"] - sums["nonfinite"]
    if sums[f"{metric}_n"] != n:
        return None  # some tokens came without their whole sequence
    parts = ("sequences", "n", "n_squared", "y_squared", "y_times_n")
    m, n, n_squared, *products = (sums[f"{metric}_{part}"] for part in parts)
    moments = (m, n, n_squared, sums[values], *products)
    found = ratio_interval(moments, lowest=0.0, highest=_HIGHEST[values])
    return None if found is None else {"se": found.error, "low": found.low, "high": found.high}[end]
