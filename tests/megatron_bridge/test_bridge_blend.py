"""Pretraining on a blend with Megatron-Bridge: layouts, evaluations, steps, checkpoints, names."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from megatron_lm import oracle, windows
from megatron_lm.data import Data
from megatron_lm.launch import Run

from channel_metrics.core.totals import TOTALS_FILE
from megatron_bridge import observe
from megatron_bridge.launch import LAYOUTS, BridgeLauncher, needs_megatron_bridge

pytestmark = needs_megatron_bridge

SEEN = (observe.micro_batches, observe.training)
METRICS = "metrics: [loss, token_acc, tokens, samples, share, tokens_total]\n"
STEP_TOKENS = 8 * 64
SKIPPED = 3


def blend(data: Data, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    pairs = data.weighted()
    weights = [float(weight) for weight in pairs[::2]]
    return {"dataset": {"blend": [list(pairs[1::2]), weights], "split": "80,20,0"}, **sections}


def train(
    launcher: BridgeLauncher, data: Data, layout: str = "dp2", **sections: dict[str, Any]
) -> Run:
    return launcher.train(layout, blend(data, **sections), config=METRICS, observe=SEEN)


def tokens(log: dict[str, float]) -> float:
    return sum(value for key, value in log.items() if key.endswith("_tokens"))


def check(log: dict[str, float], wanted: dict[str, float]) -> None:
    """Losses, accuracies, tokens and shares are the same."""
    keys = {
        key for key in wanted if key.split("_", 1)[1] in ("loss", "token_acc", "tokens", "share")
    }
    assert keys and {key: log[key] for key in keys} == pytest.approx(
        {key: wanted[key] for key in keys}, rel=1e-5
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_blend(launcher: BridgeLauncher, data: Data, layout: str) -> None:
    run = train(launcher, data, layout)
    logs, lm_loss = oracle.logged(run), list(run.scalars["lm loss"].values())
    assert [oracle.total_loss(log) for log in logs] == pytest.approx(lm_loss, rel=1e-5)
    assert [tokens(log) for log in logs] == [STEP_TOKENS] * 6
    assert "do not add up" not in "".join(rank.said for rank in run.ranks)
    if layout not in ("tp2", "pp2"):  # these start from other weights, see below
        alone = train(launcher, data, "dp1")
        for log, wanted in zip(logs, oracle.logged(alone), strict=True):
            assert log == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def checkpoint(
    launcher: BridgeLauncher, data: Data, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of three iterations on one process."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save = {"save": str(folder), "save_interval": 3, "ckpt_format": "torch_dist"}
    train(launcher, data, "dp1", checkpoint=save, train={"exit_interval": 3})
    return folder


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_shards_and_stages_go_on_as_one_process(
    launcher: BridgeLauncher, data: Data, checkpoint: Path, layout: str
) -> None:
    """Each channel, from the same weights; with `finetune`, which needs a checkpoint."""
    load = {"checkpoint": {"load": str(checkpoint)}, "finetune": {"in place of": "pretrain"}}
    run = train(launcher, data, layout, **load)
    alone = oracle.logged(train(launcher, data, "dp1"))
    for log, wanted in zip(oracle.logged(run), alone[3:], strict=True):
        assert log == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("layout", ["dp1", "dp2"])
def test_windows_are_those_of_a_naive_loop(
    launcher: BridgeLauncher, data: Data, layout: str
) -> None:
    """Of training, of the evaluations in between, and of the one at the end."""
    run = train(launcher, data, layout)
    size = 4 // LAYOUTS[layout][0]
    for number, log in enumerate(oracle.logged(run)):
        wanted = windows.expected(run, "train", number * size, (number + 1) * size)
        check(log, wanted)
    for number, step in ((1, 3), (3, 6)):
        wanted = windows.expected(run, f"eval {number}", 0)
        curves = {key: run.scalars.get(f"eval_{key}", {}) for key in wanted}
        check({key: curve[step] for key, curve in curves.items() if curve}, wanted)
    assert "eval_web_tokens_total" not in run.scalars
    printed = [line for line in run.lines if line.head.startswith("validation at")]
    assert [line.iteration for line in printed] == [3, 6, 6]


@pytest.mark.parametrize("layout", ["dp2", "tp2", "cp2"])
def test_training_is_unchanged(launcher: BridgeLauncher, data: Data, layout: str) -> None:
    """Bit by bit."""
    off = launcher.train(layout, blend(data), on=False, observe=SEEN)
    on = train(launcher, data, layout)
    for rank_off, rank_on in zip(off.ranks, on.ranks, strict=True):
        assert rank_off.seen == rank_on.seen
    assert len(on.ranks[-1].seen["training"]["losses"]) == 6


def skipping() -> oracle.Result:
    """The optimizer finds an overflow at the third iteration."""
    from megatron.core.optimizer import ChainedOptimizer

    step, calls = ChainedOptimizer.step, [0]

    @functools.wraps(step)
    def sometimes(self: Any) -> Any:
        calls[0] += 1
        return (False, None, None) if calls[0] == SKIPPED else step(self)

    ChainedOptimizer.step = sometimes
    return lambda: calls[0]


def test_a_skipped_iteration_is_left_out(launcher: BridgeLauncher, data: Data) -> None:
    sections = blend(data, logger={"log_interval": 3})
    run = launcher.train("dp2", sections, config=METRICS, observe=(skipping, *SEEN))
    first, second = oracle.logged(run)
    assert (tokens(first), tokens(second)) == (2 * STEP_TOKENS, 3 * STEP_TOKENS)
    wanted = windows.expected(run, "train", 0, 4)
    check(first, wanted)


def test_an_iteration_that_runs_again_counts_once(launcher: BridgeLauncher, data: Data) -> None:
    twice = train(launcher, data, rerun_state_machine={"rerun_mode": "report_determinism_stats"})
    once = train(launcher, data)
    seen = [len(run.ranks[0].seen["micro_batches"]["train"]) for run in (twice, once)]
    assert seen == [24, 12]
    assert oracle.logged(twice) == oracle.logged(once)


def test_an_evaluation_that_reaches_the_limit_of_time(launcher: BridgeLauncher, data: Data) -> None:
    """Bridge ends it without an event, and the training after it."""
    run = train(
        launcher, data, train={"exit_duration_in_mins": 1e-9}, validation={"eval_interval": 1}
    )
    assert list(run.scalars["web_tokens"]) == [1]
    assert not [key for key in run.scalars if key.startswith("eval_")]


def test_totals_go_on_after_a_resume(launcher: BridgeLauncher, data: Data, tmp_path: Path) -> None:
    whole = train(launcher, data)
    save = {"save": str(tmp_path), "save_interval": 4, "ckpt_format": "torch_dist"}
    # The checkpoint is in the middle of a log interval.
    end, log = {"exit_interval": 4}, {"log_interval": 3}
    train(launcher, data, checkpoint=save, train=end, logger=log)
    saved = json.loads((tmp_path / "iter_0000004" / TOTALS_FILE).read_text())["channels"]
    resumed = train(launcher, data, "dp1", checkpoint={"load": str(tmp_path)})
    for name in oracle.NAMES:
        totals = whole.scalars[f"{name}_tokens_total"]
        assert saved[name]["tokens_total"] == totals[4]
        assert resumed.scalars[f"{name}_tokens_total"][6] == totals[6]


def test_names_of_the_config(launcher: BridgeLauncher, data: Data) -> None:
    """In the order of the blend; two data sets may share one. Here there is a test set, too."""
    config = "channels: [all, tiny, all]\n"
    settings = blend(data, positional={"with": "a callback"})
    settings["dataset"]["split"] = "70,20,10"
    run = launcher.train("dp1", settings, config=config)
    names = {key.removesuffix("_share") for key in run.scalars if key.endswith("_share")}
    assert "the user's callback at 6" in run.ranks[0].said
    assert names == {
        f"{split}{name}" for split in ("", "eval_", "test_") for name in ("all", "tiny")
    }
    config = "channels: [one, two]\n"
    run = launcher.train("dp1", blend(data), config=config, check=False)
    assert "ConfigError" in run.failure and "got 2 names (one, two)" in run.failure
    assert "but the blend has 3 data sets" in run.failure


def test_a_blend_per_split(launcher: BridgeLauncher, data: Data) -> None:
    """Each split has data sets of its own."""
    path = dict(zip(oracle.NAMES, data.weighted()[1::2], strict=True))
    sets = {"blend_per_split": [[[path["web"], path["code"]], None], [[path["math"]], None], None]}
    run = launcher.train("dp1", {"dataset": sets}, config=METRICS, observe=SEEN)
    assert {key.split("_")[0] for log in oracle.logged(run) for key in log} == {"web", "code"}
    for number, log in enumerate(oracle.logged(run)):
        check(log, windows.expected(run, "train", number * 4, (number + 1) * 4))
    assert {key for key in run.scalars if key.endswith("_loss") and "eval_" in key} == {
        "eval_math_loss"
    }


def test_mock_data(launcher: BridgeLauncher, data: Data) -> None:
    run = launcher.train("dp1", {"dataset": {}}, config=METRICS)
    assert list(run.scalars["mock_tokens"].values()) == [STEP_TOKENS] * 6
    assert list(run.scalars["mock_loss"].values()) == pytest.approx(
        list(run.scalars["lm loss"].values()), rel=1e-5
    )
