"""Totals in checkpoints: a resume goes on exactly, in any layout; and layouts agree from there."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
from pathlib import Path

import pytest

from channel_metrics.core.totals import TOTALS_FILE
from megatron_lm import oracle
from megatron_lm.data import Data
from megatron_lm.launch import Launcher, Run, needs_megatron_training
from megatron_lm.layouts import ITERATIONS

pytestmark = needs_megatron_training

METRICS = ("loss", "token_acc", "tokens", "samples", "tokens_total", "samples_total")
CHANNELS = ("--channels", *oracle.NAMES, "--channels-metrics", *METRICS)
# So that two pipeline stages have two chunks each.
FOUR_LAYERS = ("--num-layers", "4")
INTERVAL_3 = ("--log-interval", "3")


@pytest.fixture(scope="module")
def whole(launcher: Launcher, data: Data) -> Run:
    return launcher.run("dp2", *data.blend(), *FOUR_LAYERS, *CHANNELS, patch=True)


@pytest.fixture(scope="module")
def checkpoint(launcher: Launcher, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After iteration 4, in the middle of a log interval."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save = ("--save", str(folder), "--save-interval", "4", "--exit-interval", "4")
    args = (*data.blend(), *FOUR_LAYERS, *CHANNELS, *INTERVAL_3, *save)
    launcher.run("dp2", *args, patch=True)
    return folder


def spawned_process() -> oracle.Result:
    """As in Megatron itself, and not as in `cpu`: the process for a checkpoint is spawned."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async as saving

    saving.get_write_results_queue = saving.get_write_results_queue.func
    return lambda: saving._results_queue is not None


def totals(run: Run) -> dict[str, float]:
    """At the last iteration."""
    return {key: curve[ITERATIONS] for key, curve in run.scalars.items() if key.endswith("_total")}


def counted(run: Run) -> dict[str, float]:
    """What the windows add up to."""
    return {
        f"{key}_total": sum(curve.values())
        for key, curve in run.scalars.items()
        if key.endswith(("_tokens", "_samples"))
    }


def test_totals_are_the_sum_of_the_windows(whole: Run) -> None:
    assert totals(whole) == counted(whole)
    assert len(totals(whole)) == 2 * len(oracle.NAMES)
    curve = whole.scalars["web_tokens_total"]
    assert list(curve) == list(range(1, ITERATIONS + 1))
    assert list(curve.values()) == sorted(curve.values())


def test_the_open_window_is_in_the_checkpoint(checkpoint: Path, whole: Run) -> None:
    saved = json.loads((checkpoint / "iter_0000004" / TOTALS_FILE).read_text())
    for name in oracle.NAMES:
        for metric in ("tokens", "samples"):
            wanted = whole.scalars[f"{name}_{metric}_total"][4]
            assert saved["channels"][name][f"{metric}_total"] == wanted


def test_a_spawned_process_says_nothing(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    """It imports the script, and finds the patch in its environment."""
    save = ("--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2")
    args = (*data.blend(), *CHANNELS, *save)
    (rank,) = launcher.run("dp1", *args, patch=True, observe=(spawned_process,)).ranks
    assert rank.seen["spawned_process"]
    assert (rank.out + rank.err).count("channel metrics: patched") == 1


@pytest.mark.parametrize("layout", ["dp1", "dp2", "tp2", "pp2", "pp2_vpp2", "tp2_pp2"])
def test_a_resume_goes_on_exactly(
    launcher: Launcher, data: Data, checkpoint: Path, whole: Run, layout: str
) -> None:
    load = ("--load", str(checkpoint))
    run = launcher.run(layout, *data.blend(), *FOUR_LAYERS, *CHANNELS, *load, patch=True)
    assert totals(run) == totals(whole)
    for key, curve in whole.scalars.items():
        if key.startswith(tuple(f"{name}_" for name in oracle.NAMES)):
            after = {step: value for step, value in curve.items() if step > 4}
            assert run.scalars.get(key, {}) == pytest.approx(after, rel=1e-5), key


def test_a_resume_with_other_channels(
    launcher: Launcher, data: Data, checkpoint: Path, tmp_path: Path
) -> None:
    """One that comes starts at zero; one that left is logged no more, and keeps its total."""
    args = ("--channels", "web", "code", "sums", "--channels-metrics", "tokens", "tokens_total")
    folders = ("--load", str(checkpoint), "--save", str(tmp_path), "--save-interval", "6")
    run = launcher.run("dp1", *data.blend(), *FOUR_LAYERS, *args, *folders, patch=True)
    assert totals(run)["sums_tokens_total"] == sum(run.scalars["sums_tokens"].values())
    assert not any(key.startswith("math_") for key in run.scalars)
    before, after = (
        json.loads((folder / TOTALS_FILE).read_text())["channels"]
        for folder in (checkpoint / "iter_0000004", tmp_path / "iter_0000006")
    )
    assert after["math"] == before["math"]
    assert after["web"]["tokens_total"] == totals(run)["web_tokens_total"]


def test_a_checkpoint_without_totals_warns(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    save = ("--save", str(tmp_path), "--save-interval", "4", "--exit-interval", "4")
    launcher.run("dp1", *data.blend(), *save)
    assert not list(tmp_path.rglob(TOTALS_FILE))
    run = launcher.run("dp1", *data.blend(), *CHANNELS, "--load", str(tmp_path), patch=True)
    said = f"has no {TOTALS_FILE}: it was written without channel metrics"
    assert said in run.ranks[0].said
    assert totals(run) == counted(run)


def killed_at_5() -> oracle.Result:
    """As if the machine went away, after iteration 5 was counted."""
    from megatron.training import training

    log = training.training_log
    signature = inspect.signature(log)

    @functools.wraps(log)
    def training_log(*args: object, **kwargs: object) -> object:
        result = log(*args, **kwargs)
        if signature.bind(*args, **kwargs).arguments["iteration"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    training.training_log = training_log
    return lambda: None


def test_a_kill_counts_nothing_twice(
    launcher: Launcher, data: Data, tmp_path: Path, whole: Run
) -> None:
    args = (*data.blend(), *FOUR_LAYERS, *CHANNELS)
    save = ("--save", str(tmp_path), "--save-interval", "2")
    dead = launcher.run("dp2", *args, *save, patch=True, observe=(killed_at_5,), check=False)
    assert {rank.code for rank in dead.ranks} == {-signal.SIGKILL}
    run = launcher.run("dp2", *args, "--load", str(tmp_path), patch=True)
    assert list(run.scalars["web_tokens_total"]) == [5, 6]
    assert totals(run) == totals(whole)
