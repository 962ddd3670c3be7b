"""How the gradient of one layer is made up of channels: what is logged of it.

Letters: G_c is the sum over the tokens of a channel, G that over all tokens; N sequences, H is the
hidden size. `channel_metrics.capture.gradients` measures them.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from channel_metrics.core.registry import RunMetric

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GRADIENTS", "gradient_columns", "gradient_values"]

_SOURCE = "gradients of the last norm's output"
_COST = "the last norm twice more, and the hidden size more numbers per row and window"

GRADIENTS = (
    RunMetric(
        "grad_share",
        "part of 1",
        "G_c * G / (G * G): the part of a channel in the last norm's gradient; the channels add up "
        "to 1, and one that works against the others is below 0",
        _SOURCE,
        _COST,
    ),
    RunMetric("grad_norm", "part", "the norm of G_c / the norm of G", _SOURCE, _COST),
    RunMetric(
        "grad_cosine",
        "-1 to 1",
        "the cosine between G_c and the gradient of all other tokens, G - G_c",
        _SOURCE,
        _COST,
    ),
    RunMetric(
        "grad_noise",
        "sequences",
        "the noise scale V / (M - V / N), where N sequences of the channel have gradients g, "
        "M = (sum(g) / N)^2 and V = (sum(g^2) / N - M) N / (N - 1); absent unless M > V / N",
        "such gradients of sequences, and their squares",
        _COST,
    ),
)


def gradient_columns(size: int) -> tuple[str, ...]:
    """The columns of a table of gradients [H]."""
    return ("sequences", "squares", *(f"g{i}" for i in range(size)))


def gradient_values(
    names: Sequence[str], sums: Tensor, total: Tensor, wanted: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{name: {metric: value}}; a value that is not known or not finite is absent.

    Args:
        names: of the rows.
        sums: float64 [rows, H + 2], the sums of `gradient_columns`.
        total: float64 [H], G.
        wanted: the metrics that are logged.
    """
    found = {}
    for name, row in zip(names, sums, strict=True):
        own, whole = row[2:], float(total.norm())
        if not float(own.norm()):
            continue
        rest = total - own
        values = {
            "grad_share": _ratio(float(own @ total), whole**2),
            "grad_norm": _ratio(float(own.norm()), whole),
            "grad_cosine": _ratio(float(own @ rest), float(own.norm() * rest.norm())),
            "grad_noise": _noise(float(row[0]), float(row[1]), float(own @ own)),
        }
        found[name] = {metric: values[metric] for metric in wanted if math.isfinite(values[metric])}
    return found


def _noise(sequences: float, squares: float, square: float) -> float:
    """tr(covariance) / |mean|^2 of N gradients, both without bias (arXiv 1812.06162, appendix A).

    squares: the sum of |gradient|^2. square: |their sum|^2.
    """
    if sequences < 2:
        return math.nan
    mean = square / sequences**2
    variance = (squares / sequences - mean) * sequences / (sequences - 1)
    signal = mean - variance / sequences
    return variance / signal if signal > 0 else math.nan


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
