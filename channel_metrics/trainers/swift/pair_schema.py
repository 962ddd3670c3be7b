"""What is counted and logged of preference pairs in `swift rlhf`."""

from __future__ import annotations

from functools import partial

from channel_metrics.core.schema import Column, Metric, Schema, Sums, ratio
from channel_metrics.trainers.trl.samples import pair_rewards, sample_schema

__all__ = ["pair_schema"]


def pair_schema(nll_weight: float = 0.0) -> Schema:
    """The means that ms-swift logs, and the loss.

    Args:
        nll_weight: the factor of the nll of the chosen answers in the loss. If it is 0, there is
            no `nll_loss`.
    """
    schema = sample_schema(
        "pairs",
        *pair_rewards("ms-swift"),
        Column("loss", "nats", "losses of the pairs whose loss is known, without nll"),
        Column("loss_samples", "pairs", "pairs whose loss is known"),
    )
    needs = ["loss", "loss_samples", "samples"]
    if nll_weight:
        needs += ["nll", "nll_tokens"]
        schema.register(
            Column("nll", "nats", "nll of the chosen answers"),
            Column("nll_tokens", "tokens", "tokens of the chosen answers"),
            Metric(
                "nll_loss",
                ("nll", "nll_tokens"),
                _nll,
                unit="nats",
                doc="nll / nll_tokens",
                always=True,
            ),
        )
    formula = partial(_loss, nll_weight)
    schema.register(
        Metric("loss", tuple(needs), formula, unit="nats", doc="loss / samples, and nll_loss")
    )
    return schema


def _nll(sums: Sums) -> float | None:
    return ratio(sums["nll"], sums["nll_tokens"])


def _loss(nll_weight: float, sums: Sums) -> float | None:
    """The mean, if the loss of every pair is known."""
    of_pairs = ratio(sums["loss"], sums["samples"])
    nll = _nll(sums) if nll_weight else 0.0
    if of_pairs is None or nll is None or sums["loss_samples"] != sums["samples"]:
        return None
    return of_pairs + nll_weight * nll
