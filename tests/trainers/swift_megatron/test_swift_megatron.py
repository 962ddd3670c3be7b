"""ms-swift's Megatron trainer, run for real on the CPU: exact numbers, and the same training.

Two oracles: what ms-swift logs alone, and a loop over all tokens (`swift_megatron_observe`). What
stands in for a GPU's parts is said in `swift_megatron_cpu`.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from typing import Any

import pytest
from swift_files import CHANNELS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("swift") is None,
    reason="ms-swift is only in the main environment (Python 3.11): `make test` runs this",
)

LAYOUTS = [
    "padded_dp1",
    "packed_dp1",
    "padded_dp2",
    "packed_tp2",
    "packed_pp2",
    "packed_vpp2",
    "packed_cp2",
    "padded_cp2",
    "packed_cp2_contiguous",
]
WEIGHTED = ["weighted", "dft"]
# Of all data-parallel ranks; ms-swift always saves at the end.
STEPS, MICRO_BATCHES, CHECKPOINTS = 3, 12, 1

Logs = list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if importlib.util.find_spec("mcore_bridge") is None:
        pytest.fail("ms-swift's Megatron side needs mcore-bridge; constraints/main.txt has it")
    from swift_megatron_launch import launch

    return launch(tmp_path_factory)


def seen_tokens(runs: Any, name: str, *, training: bool = True) -> list[list[Any]]:
    """Per step (or evaluation batch): the micro-batches of all ranks, as [names, tokens]."""
    per_rank = [
        [found[1:] for found in rank["tokens"] if found[0] is training] for rank in runs.ranks(name)
    ]
    counted = [batches for batches in per_rank if batches]
    num_steps = max(log["iteration"] for log in runs.logs(name)) if training else 1
    steps: list[list[Any]] = [[] for _ in range(num_steps)]
    for batches in counted:
        each = len(batches) // num_steps
        for index, batch in enumerate(batches):
            steps[index // each].append(batch)
    return steps


def naive(batches: list[Any], copies: int = 1) -> dict[str, dict[str, float]]:
    """{channel: {metric: value}} of micro-batches, by a loop over tokens.

    copies: how many ranks hold a part of the same sequences.
    """
    tokens: dict[str, list[Any]] = {}
    samples = Counter(str(name) for names, _ in batches for name in names)
    for _, rows in batches:
        for name, nll, optimised, right in rows:
            tokens.setdefault(str(name), []).append((nll, optimised, right))
    total = sum(map(len, tokens.values()))
    return {
        name: {
            "loss": math.fsum(nll for nll, _, _ in rows) / len(rows),
            "own": math.fsum(optimised for _, optimised, _ in rows) / len(rows),
            "token_acc": sum(right for _, _, right in rows) / len(rows),
            "ppl": math.exp(math.fsum(nll for nll, _, _ in rows) / len(rows)),
            "tokens": len(rows),
            "samples": samples[name] / copies,
            "share": len(rows) / total,
        }
        for name, rows in tokens.items()
    }


def check_against_naive(log: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> None:
    """All keys of channels in `log` are there, with the values of the loop; no others."""
    names = {None: "unlabeled"}
    wanted: dict[str, float] = {}
    for name, values in expected.items():
        for metric, value in values.items():
            ours = f"{names.get(None) if name == 'None' else name}_{metric}"
            wanted[f"{prefix}loss_{name}" if metric == "own" else prefix + ours] = value
    found = {key: value for key, value in log.items() if is_ours(key) and "total" not in key}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if key.endswith(("tokens", "samples")):
            assert found[key] == value, key
        else:
            assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key


def is_ours(key: str) -> bool:
    parts = key.removeprefix("eval_")
    names = (*CHANNELS, "unlabeled")
    return parts.startswith(("loss_", *(f"{name}_" for name in names)))


def check_training(runs: Any, name: str) -> None:
    """Weights, random numbers and what ms-swift logs are the same, bit for bit."""
    off, on = runs.ranks(f"{name}_off"), runs.ranks(f"{name}_on")
    assert [rank["end"] for rank in on] == [rank["end"] for rank in off]
    assert len(off[0]["end"]) > 10
    for theirs, ours in zip(runs.logs(f"{name}_off"), runs.logs(f"{name}_on"), strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert ours.get(key) == theirs.get(key), key
        assert "loss" in theirs or "eval_loss" in theirs
        assert ours.get("eval_loss") == theirs.get("eval_loss")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(runs: Any, name: str) -> None:
    used = runs.ranks(f"{name}_on")[0]["used"]
    assert used["padding_free"] is name.startswith("packed")
    assert used["cp_partition_mode"] == ("contiguous" if "contiguous" in name else "zigzag")
    check_training(runs, name)
    steps, logs = seen_tokens(runs, f"{name}_on"), runs.logs(f"{name}_on")
    assert len(logs) == len(steps) == STEPS
    for log, batches in zip(logs, steps, strict=True):
        check_against_naive(log, naive(batches, used["context_parallel_size"]))
    totals: Counter[str] = Counter()
    for log in logs:
        totals.update({n: int(log.get(f"{n}_tokens", 0)) for n in CHANNELS})
        assert {k: v for k, v in log.items() if k.endswith("_total")} == {
            f"{n}_tokens_total": total for n, total in totals.items() if total
        }


@pytest.mark.parametrize("name", [*LAYOUTS, *WEIGHTED])
def test_the_flags_own_curves(runs: Any, name: str) -> None:
    """`loss_{channel}` stays as ms-swift alone has it, but for its faults."""
    differences = []
    for theirs, ours in zip(runs.logs(f"{name}_off"), runs.logs(f"{name}_on"), strict=True):
        own = {key: value for key, value in theirs.items() if key.startswith("loss_")}
        assert len(own) > 2 and own.keys() == {key for key in ours if key.startswith("loss_")}
        differences += [abs(ours[key] / value - 1) for key, value in own.items()]
    if name == "packed_cp2_contiguous":
        # It takes the channels for those of another cut; `test_layouts` says who is right.
        assert max(differences) > 1e-3
    else:
        assert max(differences) < 1e-6


def test_the_layouts_train_the_same_model(runs: Any) -> None:
    first = {name: runs.logs(f"{name}_on")[0] for name in (*LAYOUTS, "no_flag_tp2")}
    for log in first.values():
        assert log["loss"] == pytest.approx(first["packed_dp1"]["loss"], rel=1e-5)


def test_a_cut_that_ms_swift_gets_wrong(runs: Any) -> None:
    """Two sequences of losses 1 and 5 on two ranks, each of which has one of them whole."""
    for found in one_pack(runs):
        truth = {"math_loss": 1.0, "math_tokens": 7, "code_loss": 5.0, "code_tokens": 7}
        theirs, ours = found["zigzag"]
        assert theirs == {"math": 1.0, "code": 5.0}
        assert ours == truth | {"loss_math": 1.0, "loss_code": 5.0}
        theirs, ours = found["contiguous"]
        assert theirs == {"math": 3.0, "code": 3.0}
        assert ours == truth | {"loss_math": 1.0, "loss_code": 5.0}


def one_pack(runs: Any) -> list[dict[str, Any]]:
    return [json.loads(printed.splitlines()[-1]) for printed in runs.printed("one_pack")]


@pytest.mark.parametrize("cut", ["zigzag", "contiguous"])
def test_a_target_that_crosses_a_bound(runs: Any, cut: str) -> None:
    """It counts for its own sequence, and is told once, by the rank that has counted it."""
    for found in one_pack(runs):
        values = found[f"crossing_{cut}"]["values"]
        tokens = {key: n for key, n in values.items() if key.endswith(("tokens", "samples"))}
        twice = {"math_tokens": 14, "math_samples": 2, "code_tokens": 16, "code_samples": 2}
        assert tokens == twice
        (told,) = found[f"crossing_{cut}"]["told"]
        assert told.startswith("1 supervised targets")


def test_bounds_without_a_cut(runs: Any) -> None:
    """In labels that are shifted by one, each sequence begins one position earlier."""
    for found in one_pack(runs):
        assert found["uncut"] == [[0, 7, 15], [0, 1], 1]


def test_what_is_refused(runs: Any) -> None:
    refused = one_pack(runs)[0]["refusals"]
    wanted = {
        "one_name": "ChannelError: channel has 1 entries but the batch holds 2 sequences of the",
        "no_number": "BoundaryError: a batch of packed sequences must say how many there are",
        "positions": "BoundaryError: the batch names 2 sequences, but its position_ids start anew",
        "task": "UnsupportedVersionError: channel metrics are for the loss of language models",
        "reranker": "UnsupportedVersionError: channel metrics are for ms-swift's MegatronTrainer",
        "keys": "ConfigError: key_format '{metric}/{channel}' gives the keys loss_<channel>",
        "reserved": "ConfigError: channel 'z' would be logged as 'z_loss'",
    }
    assert refused.keys() == wanted.keys()
    for name, beginning in wanted.items():
        assert refused[name].startswith(beginning), refused[name]


def test_attach_and_detach_apply_and_revert(runs: Any) -> None:
    found = one_pack(runs)[0]
    assert found["classes"] == [True] * 4
    assert found["patches"] == [True] * 3


@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_tokens(runs: Any, name: str) -> None:
    """`loss_{channel}` is what is optimised; `{channel}_loss` is the nll."""
    check_training(runs, name)
    copies = runs.ranks(f"{name}_on")[0]["used"]["context_parallel_size"]
    logs, steps = runs.logs(f"{name}_on"), seen_tokens(runs, f"{name}_on")
    for log, batches in zip(logs, steps, strict=True):
        check_against_naive(log, naive(batches, copies))
        assert all(abs(log[f"loss_{n}"] / log[f"{n}_loss"] - 1) > 0.01 for n in present(log))
    assert "do not add up" not in "".join(runs.printed(f"{name}_on", "err"))


def present(log: dict[str, Any]) -> list[str]:
    found = [name for name in CHANNELS if f"{name}_loss" in log]
    assert found
    return found


def extra_calls(runs: Any, name: str) -> list[dict[str, int]]:
    """Per rank: how many more collectives there are with channel metrics."""
    counts = []
    for off, on in zip(runs.ranks(f"{name}_off"), runs.ranks(f"{name}_on"), strict=True):
        more = Counter(on["collectives"])
        more.subtract(off["collectives"])
        counts.append({key: number for key, number in more.items() if number})
    return counts


def test_one_all_reduce_per_log(runs: Any) -> None:
    """One more per checkpoint; and once, for the first sums of names that all ranks know."""
    calls = {"all_reduce/2": STEPS + CHECKPOINTS + 1}
    assert extra_calls(runs, "no_flag_tp2") == [calls] * 2


@pytest.mark.parametrize("name", ["padded_dp2", "packed_cp2", "packed_pp2", "packed_tp2"])
def test_nothing_is_gathered_per_micro_batch(runs: Any, name: str) -> None:
    """With the flag, ms-swift gathers names and reduces losses in each of them."""
    for rank, counts in enumerate(extra_calls(runs, name)):
        last_stage = name != "packed_pp2" or rank == 1
        group = 2 if name in ("padded_dp2", "packed_cp2") else 1
        batches = MICRO_BATCHES // (2 if name == "padded_dp2" else 1) if last_stage else 0
        wanted = Counter({"all_reduce/2": STEPS + CHECKPOINTS + 1})
        wanted.subtract({f"all_gather_object/{group}": batches, f"all_reduce/{group}": batches})
        if name == "packed_tp2":  # accuracy of a vocabulary that is cut
            wanted["all_reduce/2"] += MICRO_BATCHES
        assert counts == {key: number for key, number in wanted.items() if number}


def test_evaluation(runs: Any) -> None:
    check_training(runs, "evaluation")
    logs = runs.logs("evaluation_on")
    evaluations = [log for log in logs if "eval_loss" in log]
    assert len(evaluations) == 2
    batches = seen_tokens(runs, "evaluation_on", training=False)[0]
    half = len(batches) // 4
    first = [b for rank in range(2) for b in batches[2 * rank * half : (2 * rank + 1) * half]]
    second = [b for rank in range(2) for b in batches[(2 * rank + 1) * half :][:half]]
    for log, of_window in zip(evaluations, (first, second), strict=True):
        check_against_naive(log, naive(of_window), "eval_")
        assert not any(key.endswith("_total") for key in log)
    # `--metric_for_best_model bbu_loss`: it knows our keys.
    best = min(log["eval_bbu_loss"] for log in evaluations)
    assert runs.ranks("evaluation_on")[-1]["used"]["best"] == best
    # The training window holds no token of an evaluation.
    steps = seen_tokens(runs, "evaluation_on")
    windows = [steps[:1], steps[1:2], steps[2:]]
    for log, window in zip((e for e in logs if "loss" in e), windows, strict=True):
        check_against_naive(log, naive([batch for step in window for batch in step]))


def test_packs_of_ms_swift(runs: Any) -> None:
    """`--packing true`: many sequences in one row."""
    logs, steps = runs.logs("packing"), seen_tokens(runs, "packing")
    for log, batches in zip(logs, steps, strict=True):
        assert max(len(names) for names, _ in batches) > 2
        check_against_naive(log, naive(batches))


def test_spawned_processes_do_not_find_our_folder(runs: Any) -> None:
    """They take over the path, to which ms-swift adds the folder of a plugin, where trl.py is."""
    for name in ("packing", "padded_dp2_on"):
        for rank in runs.ranks(name):
            assert "site-packages" in rank["used"]["path"]
            assert "patches" not in rank["used"]["path"]


def test_a_stream_with_the_channel_in_a_nested_field(runs: Any) -> None:
    logs, steps = runs.logs("stream"), seen_tokens(runs, "stream")
    for log, batches in zip(logs, steps, strict=True):
        check_against_naive(log, naive(batches))
    keys = {key for log in logs for key in log}
    assert {f"{name}_loss" for name in (*CHANNELS, "unlabeled")} <= keys
    assert "loss_None" in keys


def test_totals_survive_resume(runs: Any) -> None:
    """Saved by two data-parallel ranks in the middle of a window, resumed by two stages."""
    at_once, resumed = runs.logs("resumable")[-1], runs.logs("resumed")[-1]
    totals = {key: value for key, value in at_once.items() if key.endswith("_total")}
    assert len(totals) == len(CHANNELS)
    assert totals == {key: value for key, value in resumed.items() if key.endswith("_total")}
    assert all(resumed[f"{n}_tokens"] < resumed[f"{n}_tokens_total"] for n in present(resumed))


def test_a_fault_of_ours_leaves_the_run(runs: Any) -> None:
    """One rank fails in step 2; from the next log on everything is as without us."""
    check_training(runs, "fault")
    theirs, ours = runs.logs("fault_off"), runs.logs("fault_on")
    assert present(ours[0])
    assert not any(is_ours(key) for key in ours[1])
    assert ours[2] == {key: theirs[2][key] for key in ours[2]} and len(ours[2]) == len(theirs[2])
    told = [text.count("channel metrics are off") for text in runs.printed("fault_on", "err")]
    assert told == [1, 1]
    assert "a fault of ours" in runs.printed("fault_on", "err")[1]
