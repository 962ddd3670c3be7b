"""ms-swift's Megatron trainer: evaluation, streams, checkpoints, faults; one pack by hand."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
from rank_cases import RanksOf
from swift_files import CHANNELS
from swift_megatron_checks import (
    check_against_naive,
    check_training,
    is_ours,
    naive,
    present,
    seen_tokens,
)
from swift_megatron_launch import ON, PACKED, PADDED, Case, Runs, pair
from swift_tools import needs_swift

pytestmark = needs_swift


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks_of: RanksOf) -> Runs:
    if importlib.util.find_spec("mcore_bridge") is None:
        pytest.fail("ms-swift's Megatron side needs mcore-bridge; constraints/main.txt has it")
    return Runs(tmp_path_factory.mktemp("swift_megatron"), ranks_of)


ONE_PACK = Case("one_pack", "cp2", script="swift_megatron_one_pack.py")


def one_pack(runs: Runs) -> list[dict[str, Any]]:
    return [json.loads(printed.splitlines()[-1]) for printed in runs.printed(ONE_PACK)]


def test_a_cut_that_ms_swift_gets_wrong(runs: Runs) -> None:
    """Two sequences of losses 1 and 5 on two ranks, each of which has one of them whole."""
    for found in one_pack(runs):
        truth = {"math_loss": 1.0, "math_tokens": 7, "code_loss": 5.0, "code_tokens": 7}
        theirs, ours = found["zigzag"]
        assert theirs == {"math": 1.0, "code": 5.0}
        assert ours == truth | {"loss_math": 1.0, "loss_code": 5.0}
        theirs, ours = found["contiguous"]
        assert theirs == {"math": 3.0, "code": 3.0}
        assert ours == truth | {"loss_math": 1.0, "loss_code": 5.0}


@pytest.mark.parametrize("cut", ["zigzag", "contiguous"])
def test_a_target_that_crosses_a_bound(runs: Runs, cut: str) -> None:
    """It counts for its own sequence, and is told once, by the rank that has counted it."""
    for found in one_pack(runs):
        values = found[f"crossing_{cut}"]["values"]
        tokens = {key: n for key, n in values.items() if key.endswith(("tokens", "samples"))}
        twice = {"math_tokens": 14, "math_samples": 2, "code_tokens": 16, "code_samples": 2}
        assert tokens == twice
        (told,) = found[f"crossing_{cut}"]["told"]
        assert told.startswith("1 supervised targets")


def test_bounds_without_a_cut(runs: Runs) -> None:
    """In labels that are shifted by one, each sequence begins one position earlier."""
    for found in one_pack(runs):
        assert found["uncut"] == [[0, 7, 15], [0, 1], 1]


def test_what_is_refused(runs: Runs) -> None:
    refused = one_pack(runs)[0]["refusals"]
    wanted = {
        "one_name": "ChannelError: channel has 1 entries but the batch holds 2 sequences of the",
        "no_number": "BoundaryError: a batch of packed sequences must say how many there are",
        "positions": "BoundaryError: the batch names 2 sequences, but its position_ids start anew",
        "pieces": "BoundaryError: sequence 0 of the batch has 8 tokens (seq_lens), but its",
        "task": "UnsupportedVersionError: channel metrics are for the loss of language models",
        "reranker": "UnsupportedVersionError: channel metrics are for ms-swift's MegatronTrainer",
        "keys": "ConfigError: key_format '{metric}/{channel}' gives 'loss' and 'channel_loss' of a",
        "reserved": "ConfigError: channel 'z' would be logged as 'z_loss'",
    }
    assert refused.keys() == wanted.keys()
    for name, beginning in wanted.items():
        assert refused[name].startswith(beginning), refused[name]


def test_attach_and_detach_apply_and_revert(runs: Runs) -> None:
    found = one_pack(runs)[0]
    assert found["classes"] == [True] * 4
    assert found["patches"] == [True] * 3


EVALUATION = pair(
    "evaluation",
    "dp2",
    PADDED,
    {
        "val_dataset": "FILES[plain]",
        "eval_steps": 2,
        "eval_iters": 2,
        "train_iters": 4,
        "logging_steps": 2,
        "metric_for_best_model": "bbu_loss",
    },
)


def test_evaluation(runs: Runs) -> None:
    check_training(runs, EVALUATION)
    logs = runs.logs(EVALUATION.on)
    evaluations = [log for log in logs if "eval_loss" in log]
    assert len(evaluations) == 2
    batches = seen_tokens(runs, EVALUATION.on, training=False)[0]
    half = len(batches) // 4
    first = [b for rank in range(2) for b in batches[2 * rank * half : (2 * rank + 1) * half]]
    second = [b for rank in range(2) for b in batches[(2 * rank + 1) * half :][:half]]
    for log, of_window in zip(evaluations, (first, second), strict=True):
        check_against_naive(log, naive(of_window), "eval_")
        assert not any(key.endswith("_total") for key in log)
    # `--metric_for_best_model bbu_loss`: it knows our keys.
    best = min(log["eval_bbu_loss"] for log in evaluations)
    assert runs.ranks(EVALUATION.on)[-1]["used"]["best"] == best
    # The training window holds no token of an evaluation.
    steps = seen_tokens(runs, EVALUATION.on)
    windows = [steps[:1], steps[1:2], steps[2:]]
    for log, window in zip((e for e in logs if "loss" in e), windows, strict=True):
        check_against_naive(log, naive([batch for step in window for batch in step]))


STREAM = Case("stream", "dp2", PADDED | {"streaming": True}, ON, data="fused")


def test_a_stream_with_the_channel_in_a_nested_field(runs: Runs) -> None:
    logs, steps = runs.logs(STREAM), seen_tokens(runs, STREAM)
    for log, batches in zip(logs, steps, strict=True):
        check_against_naive(log, naive(batches))
    keys = {key for log in logs for key in log}
    assert {f"{name}_loss" for name in (*CHANNELS, "unlabeled")} <= keys
    assert "loss_None" in keys


AXES = {"again": "metadata._fusion_source", "domain": "metadata._fusion_domain"}
LABELS = Case("labels", "cp2", PACKED, ON | {"axes": AXES}, data="fused")


def test_labels_from_columns_that_ms_swift_drops(runs: Runs) -> None:
    """One axis is read from the field of the channel, so its values are those of the channels."""
    logs, domains = runs.logs(LABELS), ("target", "source", "unlabeled")
    keys = {key for log in logs for key in log}
    for log in logs:
        again = {key: value for key, value in log.items() if key.startswith("again/")}
        assert again and again == {key: log[key.removeprefix("again/")] for key in again}
        by_domain = [log.get(f"domain/{name}_tokens", 0) for name in domains]
        assert sum(by_domain) == sum(log.get(f"{n}_tokens", 0) for n in (*CHANNELS, "unlabeled"))
    assert {f"domain/{name}_loss" for name in domains} <= keys


# The first iteration is always logged; the checkpoint comes in the middle of the next window.
SAVING = {
    "train_iters": 4,
    "logging_steps": 4,
    "save_steps": 2,
    "save_strategy": "steps",
    "save_safetensors": False,
}
RESUMABLE = Case("resumable", "dp2", PACKED | SAVING, ON)
RESUMED = Case(
    "resumed",
    "pp2",
    PACKED
    | SAVING
    | {
        "mcore_model": "FILES[checkpoint]",
        "finetune": False,
        "no_load_optim": True,
        "save_safetensors": True,
    },
    ON,
    resumes=RESUMABLE,
)


def test_totals_survive_resume(runs: Runs) -> None:
    """Saved by two data-parallel ranks in the middle of a window, resumed by two stages."""
    at_once, resumed = runs.logs(RESUMABLE)[-1], runs.logs(RESUMED)[-1]
    totals = {key: value for key, value in at_once.items() if key.endswith("_total")}
    assert len(totals) == len(CHANNELS)
    assert totals == {key: value for key, value in resumed.items() if key.endswith("_total")}
    assert all(resumed[f"{n}_tokens"] < resumed[f"{n}_tokens_total"] for n in present(resumed))


FAULT = pair("fault", "dp2", PADDED, metrics=ON | {"on_error": "warn"}, observe=("fault",))


def test_a_fault_of_ours_leaves_the_run(runs: Runs) -> None:
    """One rank fails in step 2; from the next log on everything is as without us."""
    check_training(runs, FAULT)
    theirs, ours = runs.logs(FAULT.off), runs.logs(FAULT.on)
    assert present(ours[0])
    assert not any(is_ours(key) for key in ours[1])
    assert ours[2] == {key: theirs[2][key] for key in ours[2]} and len(ours[2]) == len(theirs[2])
    told = [text.count("channel metrics are off") for text in runs.printed(FAULT.on, "err")]
    assert told == [1, 1]
    assert "a fault of ours" in runs.printed(FAULT.on, "err")[1]
