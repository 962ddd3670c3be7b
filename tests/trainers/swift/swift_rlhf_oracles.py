"""What `swift rlhf` must log of some records, by loops in Python floats."""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]
BETA, CENTER, RPO, GAMMA = 0.1, 0.05, 0.5, 0.3


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def of_rewards(chosen: list[float], rejected: list[float]) -> dict[str, float]:
    pairs = list(zip(chosen, rejected, strict=True))
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean([c - r for c, r in pairs]),
        "rewards/accuracies": mean([float(c > r) for c, r in pairs]),
    }


def of_dpo(records: list[Record]) -> dict[str, float]:
    chosen, rejected = (
        [BETA * (r[f"policy {side}"] - r[f"reference {side}"]) for r in records]
        for side in ("chosen", "rejected")
    )
    losses = [-log_sigmoid(c - r) for c, r in zip(chosen, rejected, strict=True)]
    return of_rewards(chosen, rejected) | {"loss": mean(losses)}


def nll_of(records: list[Record]) -> float:
    tokens: float = sum(r["tokens chosen"] for r in records)
    log_probs: float = sum(r["policy chosen"] for r in records)
    return -log_probs / tokens


def of_rpo(records: list[Record]) -> dict[str, float]:
    """Half of an apo_zero loss, twice that of sigmoid, and the nll of the chosen answers."""
    one = of_dpo(records)
    apo = []
    for r in records:
        c, j = (BETA * (r[f"policy {s}"] - r[f"reference {s}"]) for s in ("chosen", "rejected"))
        apo.append(1 - 1 / (1 + math.exp(-c)) + 1 / (1 + math.exp(-j)))
    rewards = {key: 2.5 * value for key, value in one.items() if key.startswith("rewards/")}
    rewards["rewards/accuracies"] = one["rewards/accuracies"]
    nll = nll_of(records)
    loss = 2 * one["loss"] + 0.5 * mean(apo) + RPO * nll
    return rewards | {"loss": loss, "nll_loss": nll}


def of_orpo(records: list[Record]) -> dict[str, float]:
    chosen, rejected = (
        [r[f"policy {side}"] / r[f"tokens {side}"] for r in records]
        for side in ("chosen", "rejected")
    )
    odds = [
        log_sigmoid(c - r - math.log1p(-math.exp(c)) + math.log1p(-math.exp(r)))
        for c, r in zip(chosen, rejected, strict=True)
    ]
    rewards = of_rewards([BETA * c for c in chosen], [BETA * r for r in rejected])
    nll = nll_of(records)
    return rewards | {"nll_loss": nll, "loss": nll - BETA * mean(odds)}


def of_cpo(records: list[Record]) -> dict[str, float]:
    """The hinge loss on sums of log probabilities, and half the nll."""
    sides = ([BETA * r[f"policy {side}"] for r in records] for side in ("chosen", "rejected"))
    chosen, rejected = sides
    nll = nll_of(records)
    hinges = [max(0.0, 1 - c + j) for c, j in zip(chosen, rejected, strict=True)]
    return of_rewards(chosen, rejected) | {"nll_loss": nll, "loss": 0.5 * nll + mean(hinges)}


def of_simpo(records: list[Record]) -> dict[str, float]:
    """On means per token, without nll."""
    chosen, rejected = (
        [BETA * r[f"policy {side}"] / r[f"tokens {side}"] for r in records]
        for side in ("chosen", "rejected")
    )
    losses = [-log_sigmoid(c - j - GAMMA) for c, j in zip(chosen, rejected, strict=True)]
    return of_rewards(chosen, rejected) | {"loss": mean(losses)}


def of_rm(records: list[Record]) -> dict[str, float]:
    chosen, rejected = ([r[f"reward {side}"] for r in records] for side in ("chosen", "rejected"))
    losses = [
        -log_sigmoid(c - j - r["margin"]) + CENTER * (c + j) ** 2
        for c, j, r in zip(chosen, rejected, records, strict=True)
    ]
    return of_rewards(chosen, rejected) | {"loss": mean(losses)}


def of_kto(records: list[Record], kl: float | None = None) -> dict[str, float]:
    """The rewards; and the losses, if all are of one batch with this KL."""
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for r in records:
        rewards[r["label"]].append(BETA * (r["policy answer"] - r["reference answer"]))
    found = {}
    for name, label in (("chosen", True), ("rejected", False)):
        if rewards[label]:
            found[f"rewards/{name}"] = mean(rewards[label])
    if len(found) == 2:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    if kl is not None:
        gains = [one - BETA * kl for one in rewards[True]] + [BETA * kl - r for r in rewards[False]]
        found["loss"] = mean([1 - 1 / (1 + math.exp(-gain)) for gain in gains])
    return found


def of_apo_unpaired(records: list[Record]) -> dict[str, float]:
    """Here the loss of an answer follows from its reward."""
    losses = []
    for r in records:
        reward = BETA * (r["policy answer"] - r["reference answer"])
        sigmoid = 1 / (1 + math.exp(-reward))
        losses.append(1 - sigmoid if r["label"] else 0.5 * sigmoid)
    return of_kto(records) | {"loss": mean(losses)}
