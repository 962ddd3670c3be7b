"""`swift rlhf` but grpo: metrics per channel, against a loop over the records.

The first step is a whole epoch, so its window holds every record, under the weights that the run
began with. The same training with and without the metrics must agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rank_cases import Case, RanksOf, case
from swift_checks import check_training
from swift_rlhf_files import CHANNELS, NUM_RECORDS, both, given, shared
from swift_rlhf_oracles import (
    BETA,
    CENTER,
    GAMMA,
    RPO,
    Record,
    of_apo_unpaired,
    of_cpo,
    of_dpo,
    of_kto,
    of_orpo,
    of_rm,
    of_rpo,
    of_simpo,
)
from swift_tools import SWIFT, needs_swift

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)
on_two = case(SWIFT, ranks=2)


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
def kto_in_one_batch(folder: Path) -> Any:
    """Its KL is the one that ms-swift logs. With the models exchanged, it is not 0."""
    base = shared(folder)
    models = {"model": str(base / "reference"), "ref_model": str(base / "model")}
    whole = {"per_device_train_batch_size": NUM_RECORDS, "gradient_accumulation_steps": 1}
    return both(given(folder, "kto", beta=BETA, **whole) | models)


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


def test_the_kl_of_a_batch_is_in_the_losses_of_kto(ranks_of: RanksOf) -> None:
    (found,) = ranks_of(kto_in_one_batch)
    (first, *_) = [entry for entry in found["on"]["log"] if "loss" in entry]
    assert first["kl"] > 0.1
    check(first, found["records"], partial(of_kto, kl=first["kl"]))


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
