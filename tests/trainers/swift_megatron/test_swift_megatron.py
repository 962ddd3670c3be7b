"""ms-swift's Megatron trainer, run for real on the CPU: exact numbers, and the same training.

Two oracles: what ms-swift logs alone, and a loop over all tokens (`swift_megatron_observe`). What
stands in for a GPU's parts is said in `swift_megatron_cpu`.
"""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
from rank_cases import RanksOf
from swift_files import CHANNELS
from swift_megatron_checks import check_against_naive, check_training, naive, present, seen_tokens
from swift_megatron_launch import ON, PACKED, PADDED, Case, Pair, Runs, pair
from swift_tools import needs_swift

pytestmark = needs_swift

PADDED_DP2 = pair("padded_dp2", "dp2", PADDED)
PACKED_DP1 = pair("packed_dp1", "dp1", PACKED)
PACKED_TP2 = pair("packed_tp2", "tp2", PACKED)
PACKED_PP2 = pair("packed_pp2", "pp2", PACKED)
PACKED_VPP2 = pair("packed_vpp2", "vpp2", PACKED)
PACKED_CP2 = pair("packed_cp2", "cp2", PACKED)
CONTIGUOUS = pair("packed_cp2_contiguous", "cp2_contiguous", PACKED)
LAYOUTS = [
    pair("padded_dp1", "dp1", PADDED),
    PACKED_DP1,
    PADDED_DP2,
    PACKED_TP2,
    PACKED_PP2,
    PACKED_VPP2,
    PACKED_CP2,
    pair("padded_cp2", "cp2", PADDED),
    CONTIGUOUS,
]
WEIGHTED = [
    pair("weighted", "dp1", PADDED, {"loss_scale": "react"}, data="react"),
    pair("dft", "cp2", PACKED, {"enable_dft_loss": True}),
]
NO_FLAG = pair(
    "no_flag_tp2",
    "tp2",
    PACKED,
    {"enable_channel_loss": False},
    metrics={"metrics": ("loss", "tokens", "share")},
)
# A packing process that is spawned imports everything again.
PACKING = {"packing": True, "dataloader_multiprocessing_context": "fork"}
PACKS = Case("packing", "dp1", PACKED | PACKING, ON)
# Of all data-parallel ranks; ms-swift always saves at the end.
STEPS, MICRO_BATCHES, CHECKPOINTS = 3, 12, 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks_of: RanksOf) -> Runs:
    if importlib.util.find_spec("mcore_bridge") is None:
        pytest.fail("ms-swift's Megatron side needs mcore-bridge; constraints/main.txt has it")
    return Runs(tmp_path_factory.mktemp("swift_megatron"), ranks_of)


@pytest.mark.parametrize("pair", LAYOUTS)
def test_layouts(runs: Runs, pair: Pair) -> None:
    used = runs.ranks(pair.on)[0]["used"]
    assert used["padding_free"] is (pair.on.given == PACKED)
    assert used["cp_partition_mode"] == ("contiguous" if pair is CONTIGUOUS else "zigzag")
    if pair is PACKED_VPP2:
        runs.repeat_until_equal(pair)
    check_training(runs, pair)
    steps, logs = seen_tokens(runs, pair.on), runs.logs(pair.on)
    assert len(logs) == len(steps) == STEPS
    for log, batches in zip(logs, steps, strict=True):
        check_against_naive(log, naive(batches, used["context_parallel_size"]))
    totals: Counter[str] = Counter()
    for log in logs:
        totals.update({n: int(log.get(f"{n}_tokens", 0)) for n in CHANNELS})
        assert {k: v for k, v in log.items() if k.endswith("_total")} == {
            f"{n}_tokens_total": total for n, total in totals.items() if total
        }


@pytest.mark.parametrize("pair", [*LAYOUTS, *WEIGHTED])
def test_the_flags_own_curves(runs: Runs, pair: Pair) -> None:
    """`loss_{channel}` stays as ms-swift alone has it, but for its faults."""
    differences = []
    for theirs, ours in zip(runs.logs(pair.off), runs.logs(pair.on), strict=True):
        own = {key: value for key, value in theirs.items() if key.startswith("loss_")}
        assert len(own) > 2 and own.keys() == {key for key in ours if key.startswith("loss_")}
        differences += [abs(ours[key] / value - 1) for key, value in own.items()]
    if pair is CONTIGUOUS:
        # It takes the channels for those of another cut; `test_layouts` says who is right.
        assert max(differences) > 1e-3
    else:
        assert max(differences) < 1e-6


def test_the_layouts_train_the_same_model(runs: Runs) -> None:
    first = {pair.__name__: runs.logs(pair.on)[0] for pair in (*LAYOUTS, NO_FLAG)}
    for log in first.values():
        assert log["loss"] == pytest.approx(first[PACKED_DP1.__name__]["loss"], rel=1e-5)


@pytest.mark.parametrize("pair", WEIGHTED)
def test_weighted_tokens(runs: Runs, pair: Pair) -> None:
    """`loss_{channel}` is what is optimised; `{channel}_loss` is the nll."""
    check_training(runs, pair)
    copies = runs.ranks(pair.on)[0]["used"]["context_parallel_size"]
    logs, steps = runs.logs(pair.on), seen_tokens(runs, pair.on)
    for log, batches in zip(logs, steps, strict=True):
        check_against_naive(log, naive(batches, copies))
        assert all(abs(log[f"loss_{n}"] / log[f"{n}_loss"] - 1) > 0.01 for n in present(log))
    assert "do not add up" not in "".join(runs.printed(pair.on, "err"))


def extra_calls(runs: Runs, pair: Pair) -> list[dict[str, int]]:
    """Per rank: how many more collectives there are with channel metrics."""
    counts = []
    for off, on in zip(runs.ranks(pair.off), runs.ranks(pair.on), strict=True):
        more = Counter(on["collectives"])
        more.subtract(off["collectives"])
        counts.append({key: number for key, number in more.items() if number})
    return counts


def test_one_all_reduce_per_log(runs: Runs) -> None:
    """One more per checkpoint; and once, for the first sums of names that all ranks know."""
    calls = {"all_reduce/2": STEPS + CHECKPOINTS + 1}
    assert extra_calls(runs, NO_FLAG) == [calls] * 2


@pytest.mark.parametrize("pair", [PADDED_DP2, PACKED_CP2, PACKED_PP2, PACKED_TP2])
def test_nothing_is_gathered_per_micro_batch(runs: Runs, pair: Pair) -> None:
    """With the flag, ms-swift gathers names and reduces losses in each of them."""
    for rank, counts in enumerate(extra_calls(runs, pair)):
        last_stage = pair is not PACKED_PP2 or rank == 1
        group = 2 if pair in (PADDED_DP2, PACKED_CP2) else 1
        batches = MICRO_BATCHES // (2 if pair is PADDED_DP2 else 1) if last_stage else 0
        wanted = Counter({"all_reduce/2": STEPS + CHECKPOINTS + 1})
        wanted.subtract({f"all_gather_object/{group}": batches, f"all_reduce/{group}": batches})
        if pair is PACKED_TP2:  # accuracy of a vocabulary that is cut
            wanted["all_reduce/2"] += MICRO_BATCHES
        assert counts == {key: number for key, number in wanted.items() if number}


def test_packs_of_ms_swift(runs: Runs) -> None:
    """`--packing true`: many sequences in one row."""
    logs, steps = runs.logs(PACKS), seen_tokens(runs, PACKS)
    assert logs
    for log, batches in zip(logs, steps, strict=True):
        assert max(len(names) for names, _ in batches) > 2
        check_against_naive(log, naive(batches))


def test_spawned_processes_do_not_find_our_folder(runs: Runs) -> None:
    """They take over the path, to which ms-swift adds the folder of a plugin, where trl.py is."""
    for case in (PACKS, PADDED_DP2.on):
        for rank in runs.ranks(case):
            assert "site-packages" in rank["used"]["path"]
            assert "patches" not in rank["used"]["path"]
