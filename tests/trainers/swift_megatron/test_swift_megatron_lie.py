"""ms-swift's Megatron trainer with a loss function that reports too much, with evaluations; and
`megatron rlhf`, which has no metrics."""

from __future__ import annotations

import pytest
from rank_cases import RanksOf
from swift_files import CHANNELS
from swift_megatron_launch import ON, PADDED, Case, Runs
from swift_tools import needs_swift

pytestmark = needs_swift

EVALUATION = {"val_dataset": "FILES[plain]", "eval_steps": 2, "eval_iters": 2, "train_iters": 4}
CASE = Case("gaps", "dp1", PADDED | EVALUATION, ON | {"eval_channels": ["bbu"]}, observe=("lie",))
# ms-swift moves the reference model to a GPU, unless models are initialised on the CPU.
PAIRS = {"rlhf_type": "dpo", "use_cpu_initialization": True, "enable_channel_loss": False}
RLHF = Case("rlhf", "dp1", PADDED | PAIRS, ON, data="pairs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks_of: RanksOf) -> Runs:
    return Runs(tmp_path_factory.mktemp("swift_megatron_gaps"), ranks_of)


def test_a_loss_function_that_lies_is_told_once(runs: Runs) -> None:
    """Of the windows of training and evaluation, all of which it lies in."""
    runs.logs(CASE)
    assert runs.printed(CASE, "err")[0].count("do not add up") == 1


def test_evaluations_log_the_channels_of_eval_channels(runs: Runs) -> None:
    """But for `loss_{channel}`, which ms-swift logs for all."""
    logs = runs.logs(CASE)
    evaluations = [log for log in logs if "eval_loss" in log]
    assert len(evaluations) == 2
    for log in evaluations:
        ours = {key for key in log if key.startswith(tuple(f"eval_{name}_" for name in CHANNELS))}
        assert ours == {f"eval_bbu_{m}" for m in ON["metrics"] if m != "tokens_total"}
        assert {f"eval_loss_{name}" for name in CHANNELS} <= log.keys()
    assert all(any(key.startswith(f"{name}_") for log in logs for key in log) for name in CHANNELS)


def test_megatron_rlhf_says_that_it_has_no_channel_metrics(runs: Runs) -> None:
    logs = [log for log in runs.logs(RLHF) if "rewards/margins" in log]
    assert logs
    assert not any(key.startswith(CHANNELS) for log in logs for key in log)
    told = runs.printed(RLHF, "err")[0]
    assert told.count("no channel metrics in this run") == 1
    assert "this is megatron rlhf (rlhf_type dpo)" in told
