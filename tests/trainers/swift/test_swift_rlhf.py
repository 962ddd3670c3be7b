"""`swift rlhf` but grpo: metrics per channel, against a loop over the records.

The first step is a whole epoch, so its window holds every record, under the weights that the run
began with. The same training with and without the metrics must agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_cases import Case, RanksOf, case
from swift_checks import check_training
from swift_rlhf_files import CHANNELS, NUM_RECORDS, both, given
from swift_tools import SWIFT, needs_swift

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)
on_two = case(SWIFT, ranks=2)

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


def of_kto(records: list[Record]) -> dict[str, float]:
    """The rewards. The loss has the KL of a batch in it."""
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for r in records:
        rewards[r["label"]].append(BETA * (r["policy answer"] - r["reference answer"]))
    found = {}
    for name, label in (("chosen", True), ("rejected", False)):
        if rewards[label]:
            found[f"rewards/{name}"] = mean(rewards[label])
    if len(found) == 2:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def of_apo_unpaired(records: list[Record]) -> dict[str, float]:
    """Here the loss of an answer follows from its reward."""
    losses = []
    for r in records:
        reward = BETA * (r["policy answer"] - r["reference answer"])
        sigmoid = 1 / (1 + math.exp(-reward))
        losses.append(1 - sigmoid if r["label"] else 0.5 * sigmoid)
    return of_kto(records) | {"loss": mean(losses)}


@alone
def dpo(folder: Path) -> Any:
    return both(given(folder, "dpo", beta=BETA))


@alone
def dpo_with_nll(folder: Path) -> Any:
    types = {"loss_type": ["sigmoid", "apo_zero"], "loss_weights": [2.0, 0.5]}
    return both(given(folder, "dpo", beta=BETA, rpo_alpha=RPO, **types))


@alone
def dpo_packed(folder: Path) -> Any:
    options = {"packing": True, "per_device_train_batch_size": 1, "eval_strategy": "no"}
    return both(given(folder, "dpo", beta=BETA, gradient_accumulation_steps=NUM_RECORDS, **options))


@alone
def dpo_padding_free(folder: Path) -> Any:
    return both(given(folder, "dpo", beta=BETA, padding_free=True))


@alone
def dpo_lora(folder: Path) -> Any:
    """The reference is the model without its adapter, so the first step has no rewards."""
    options = {"tuner_type": "lora", "lora_rank": 2, "target_modules": ["all-linear"]}
    return both(given(folder, "dpo", beta=BETA, ref_model=None, **options))


@alone
def orpo(folder: Path) -> Any:
    return both(given(folder, "orpo", beta=BETA))


@alone
def cpo(folder: Path) -> Any:
    return both(given(folder, "cpo", beta=BETA, loss_type="hinge", cpo_alpha=0.5))


@alone
def simpo(folder: Path) -> Any:
    return both(given(folder, "simpo", beta=BETA, simpo_gamma=GAMMA, cpo_alpha=0.0))


@alone
def rm(folder: Path) -> Any:
    return both(given(folder, "rm", center_rewards_coefficient=CENTER))


@alone
def kto(folder: Path) -> Any:
    return both(given(folder, "kto", beta=BETA))


@alone
def kto_without_kl(folder: Path) -> Any:
    options = {"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.5}
    return both(given(folder, "kto", beta=BETA, **options))


@on_two
def dpo_on_two(folder: Path) -> Any:
    options = {"gradient_accumulation_steps": NUM_RECORDS // 4, "ddp_backend": "gloo"}
    return both(given(folder, "dpo", beta=BETA, **options))


ORACLES: dict[Case, Callable[[list[Record]], dict[str, float]]] = {
    dpo: of_dpo,
    dpo_with_nll: of_rpo,
    dpo_packed: of_dpo,
    dpo_padding_free: of_dpo,
    orpo: of_orpo,
    cpo: of_cpo,
    simpo: of_simpo,
    rm: of_rm,
    kto: of_kto,
    kto_without_kl: of_apo_unpaired,
}


def check(entry: dict[str, float], records: list[Record], expected: Any, prefix: str = "") -> None:
    """The channels, and the labels on the axis `domain`."""
    domains = [{**record, "channel": f"domain/{record['domain']}"} for record in records]
    entry = {key.replace("domain/unlabeled", "domain/None"): v for key, v in entry.items()}
    check_names(entry, records, expected, prefix, CHANNELS)
    names = ("domain/target", "domain/source", "domain/None")
    check_names(entry, domains, expected, prefix, names)


def check_names(
    entry: dict[str, float], records: list[Record], expected: Any, prefix: str, names: Any
) -> None:
    for name in names:
        mine = [record for record in records if record["channel"] == name]
        if not mine:
            assert not any(key.startswith(f"{prefix}{name}_") for key in entry)
            continue
        assert entry[f"{prefix}{name}_samples"] == len(mine)
        assert entry[f"{prefix}{name}_share"] == len(mine) / len(records)
        values = expected(mine)
        for key, value in values.items():
            assert entry[f"{prefix}{name}_{key}"] == pytest.approx(value, rel=2e-5, abs=1e-5), key
        extra = [
            key
            for key in entry
            if key.startswith(f"{prefix}{name}_rewards/")
            and key.removeprefix(f"{prefix}{name}_") not in values
        ]
        assert not extra


@pytest.mark.parametrize("of", ORACLES)
def test_one_process(ranks_of: RanksOf, of: Case) -> None:
    (found,) = ranks_of(of)
    check_training(found["off"], found["on"])
    (first, *_) = [entry for entry in found["on"]["log"] if "loss" in entry]
    check(first, found["records"], ORACLES[of])
    assert not found["on"]["told"]


@pytest.mark.parametrize("of", [case for case in ORACLES if case is not dpo_packed])
def test_evaluation(ranks_of: RanksOf, of: Case) -> None:
    """ms-swift takes the first five records: before training, with the weights of the start."""
    (found,) = ranks_of(of)
    (first, *_) = [entry for entry in found["on"]["log"] if "eval_loss" in entry]
    check(first, found["records"][:5], ORACLES[of], "eval_")


@pytest.mark.parametrize("of", [dpo, dpo_lora, orpo, rm])
def test_rewards_add_up_to_those_of_ms_swift(ranks_of: RanksOf, of: Case) -> None:
    """Weighted by their shares. Batches have one size, so ms-swift's means are those of pairs."""
    (found,) = ranks_of(of)
    check_training(found["off"], found["on"])
    entries = [entry for entry in found["on"]["log"] if "loss" in entry]
    assert entries[-1]["rewards/margins"] != 0
    for entry in entries:
        for key in ("chosen", "rejected", "margins", "accuracies"):
            ours = [entry[f"{n}_rewards/{key}"] * entry[f"{n}_share"] for n in CHANNELS]
            assert sum(ours) == pytest.approx(entry[f"rewards/{key}"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("of", [dpo, dpo_lora, kto])
def test_the_losses_add_up(ranks_of: RanksOf, of: Case) -> None:
    """Weighted by their samples, they are the loss of the step."""
    (found,) = ranks_of(of)
    for entry in found["on"]["log"]:
        if "loss" in entry:
            losses = [(entry[f"{n}_loss"], entry[f"{n}_samples"]) for n in CHANNELS]
            total = sum(loss * samples for loss, samples in losses) / NUM_RECORDS
            assert total == pytest.approx(entry["loss"], rel=1e-5)


def test_two_ranks(ranks_of: RanksOf) -> None:
    """Each rank its own pairs; and of five records to evaluate, none is counted twice."""
    for found in ranks_of(dpo_on_two):
        check_training(found["off"], found["on"])
        (first, *_) = [entry for entry in found["on"]["log"] if "loss" in entry]
        check(first, found["records"], of_dpo)
        (first, *_) = [entry for entry in found["on"]["log"] if "eval_loss" in entry]
        check(first, found["records"][:5], of_dpo, "eval_")
