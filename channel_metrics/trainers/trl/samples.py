"""Schemas of units other than tokens: preference pairs and completions."""

from __future__ import annotations

from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from channel_metrics.core.schema import Column, Metric, Schema, Sums, ratio, ratio_of
from channel_metrics.trainers.hf.mixin import RESERVED_KEYS

__all__ = [
    "PAIR_REWARDS",
    "mean",
    "pair_losses",
    "pair_rewards",
    "pair_schema",
    "pair_values",
    "reserved_keys",
    "sample_schema",
]

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
            ratio_of("samples", "all"),
            doc=f"{unit} / {unit} of all channels, `unlabeled` among them",
        ),
        *entries,
    )
    return schema


def reserved_keys(schema: Schema) -> frozenset[str]:
    """The trainer's own keys: those of transformers, and what it logs of evaluations itself."""
    own = (metric.name for metric in schema.metrics if metric.always)
    return RESERVED_KEYS | {f"eval_{name}" for name in own}


def pair_rewards() -> list[Column | Metric]:
    """What trainers log of the rewards of preference pairs."""
    entries: list[Column | Metric] = []
    for name in PAIR_REWARDS:
        units = ("pairs", "") if name == "accuracies" else ("rewards", "rewards")
        doc = f"what the trainer logs as rewards/{name}"
        entries += [Column(name, units[0], doc), mean(f"rewards/{name}", name, units[1])]
    return entries


def pair_values(chosen: Tensor, rejected: Tensor, loss: Tensor | None = None) -> dict[str, Tensor]:
    """{column: values [N]} of N pairs, for a schema with `pair_rewards`.

    Args:
        chosen, rejected: their rewards.
        loss: their losses, for a `pair_schema`; None if these are not known.
    """
    values = {
        "chosen": chosen,
        "rejected": rejected,
        "accuracies": (chosen > rejected).to(chosen.dtype),
        "margins": chosen - rejected,
    }
    if loss is not None:
        values |= {"loss": loss, "loss_samples": torch.ones_like(loss)}
    return values


def pair_schema(nll_weight: float = 0.0) -> Schema:
    """The rewards of preference pairs, and their loss.

    Args:
        nll_weight: the factor of the nll of the chosen answers in the loss. If it is 0, there is
            no `nll_loss`.
    """
    return sample_schema("pairs", *pair_rewards(), *pair_losses(nll_weight))


def pair_losses(nll_weight: float = 0.0) -> list[Column | Metric]:
    """The columns and metrics of the losses of pairs; see `pair_schema`."""
    needs, doc = ["loss", "loss_samples", "samples"], "loss / samples"
    entries: list[Column | Metric] = [
        Column("loss", "nats", "losses of the pairs whose loss is known, without nll"),
        Column("loss_samples", "pairs", "pairs whose loss is known"),
    ]
    if nll_weight:
        needs, doc = [*needs, "nll", "nll_tokens"], f"{doc}, and nll_loss"
        entries += [
            Column("nll", "nats", "nll of the chosen answers"),
            Column("nll_tokens", "tokens", "tokens of the chosen answers"),
            Metric(
                "nll_loss",
                ("nll", "nll_tokens"),
                ratio_of("nll", "nll_tokens"),
                unit="nats",
                doc="nll / nll_tokens",
                always=True,
            ),
        ]
    formula = partial(_pair_loss, nll_weight)
    return [*entries, Metric("loss", tuple(needs), formula, unit="nats", doc=doc)]


def mean(name: str, column: str, unit: str = "") -> Metric:
    """The mean of a column over the samples, which is always logged, as by the trainer."""
    return Metric(
        name,
        (column, "samples"),
        ratio_of(column, "samples"),
        unit=unit,
        doc=f"{column} / samples",
        always=True,
    )


def _pair_loss(nll_weight: float, sums: Sums) -> float | None:
    """The mean, if the loss of every pair is known."""
    of_pairs = ratio(sums["loss"], sums["samples"])
    nll = ratio(sums["nll"], sums["nll_tokens"]) if nll_weight else 0.0
    if of_pairs is None or nll is None or sums["loss_samples"] != sums["samples"]:
        return None
    return of_pairs + nll_weight * nll
