"""Excess loss: how far the loss is above that of a reference model on the same tokens.

The reference model's nll and tokens come per sequence. Where a sequence has other tokens here (it
was cut, or other tokens are supervised), the two cannot be compared, and it is left out.

This module does not import torch.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from channel_metrics.core.registry import Column, Metric, Sums, ratio

if TYPE_CHECKING:
    from torch import Tensor

    from channel_metrics.core.sums import SequenceView

__all__ = ["EXCESS_LOSS", "UNMATCHED", "excess_loss"]

EXCESS_LOSS, UNMATCHED = "excess_loss", "excess_unmatched"


def excess_loss() -> list[Column | Metric]:
    """The columns and the metric."""
    columns = [
        Column(
            name,
            unit,
            doc,
            per_sequence=partial(_of_sequences, name),
            optional=True,
            whole=True,
        )
        for name, unit, doc in (
            ("excess_nll", "nats", "nll - `ref_nll` of the sequences with `ref_tokens` tokens"),
            ("excess_tokens", "tokens", "their tokens"),
            (UNMATCHED, "sequences", "sequences without a reference, or with other tokens"),
        )
    ]
    metric = Metric(
        EXCESS_LOSS,
        tuple(column.name for column in columns),
        _excess,
        unit="nats",
        doc="(nll - `ref_nll`) / tokens, of the sequences with as many tokens as the reference "
        "model had; below 0 where the model is better",
    )
    return [*columns, metric]


def _of_sequences(name: str, view: SequenceView) -> Tensor | None:
    if view.reference is None:
        return None
    ref_nll, ref_tokens = view.reference.unbind(-1)
    tokens = view.sums["tokens"]
    if "nonfinite" in view.sums:
        tokens = tokens - view.sums["nonfinite"]
    # Where there is no reference, both are NaN.
    fits = (tokens == ref_tokens) & (ref_nll.abs() < float("inf"))
    if name == "excess_nll":
        return (view.sums["nll"] - ref_nll).where(fits, 0)
    return tokens.where(fits, 0) if name == "excess_tokens" else ~fits & (view.sums["tokens"] > 0)


def _excess(sums: Sums) -> float | None:
    return ratio(sums["excess_nll"], sums["excess_tokens"])
