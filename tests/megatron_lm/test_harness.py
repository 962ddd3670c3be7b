"""The harness itself, without channels: Megatron trains on the CPU, and layouts agree."""

from __future__ import annotations

import signal
from pathlib import Path
from textwrap import dedent

import pytest

from megatron_lm import observe
from megatron_lm.data import HELD_OUT, Data
from megatron_lm.launch import Launcher, Run, needs_megatron_training
from megatron_lm.layouts import ITERATIONS, Layout

pytestmark = needs_megatron_training

FOUR_LAYERS = ("--num-layers", "4")


def losses(run: Run) -> list[float]:
    """From TensorBoard: the line of iteration 2 prints the mean of 1 and 2."""
    by_step = run.scalars["lm loss"]
    assert list(by_step) == list(range(1, ITERATIONS + 1))
    return list(by_step.values())


@pytest.mark.parametrize("layout", ["dp2", "dp2_zero", "tp2", "tp2_sp"])
def test_a_blend_trains_as_on_one_process(launcher: Launcher, data: Data, layout: str) -> None:
    alone = launcher.run("dp1", *data.blend(), observe=(observe.weights,))
    run = launcher.run(layout, *data.blend(), observe=(observe.weights,))
    assert losses(run) == pytest.approx(losses(alone), rel=1e-6)
    assert losses(run)[-1] < losses(run)[0] - 0.1
    assert run.steps[1]["lm loss"] == pytest.approx(losses(run)[0], rel=1e-6)


@pytest.mark.parametrize("layout", ["cp2", "tp2_cp2"])
@pytest.mark.parametrize("kind", ["one_set", "masked"])
def test_context_parallel_trains_as_on_one_process(
    launcher: Launcher, data: Data, layout: str, kind: str
) -> None:
    masked = ("--dataloader-inter-document-masking",) if kind == "masked" else ()
    args = (*data.single("web"), *masked)
    alone = launcher.run("dp1", *args)
    assert losses(launcher.run(layout, *args)) == pytest.approx(losses(alone), rel=1e-6)


@pytest.fixture(scope="module")
def checkpoint(launcher: Launcher, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four layers after three iterations on two ranks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save = ("--save", str(folder), "--save-interval", "3", "--exit-interval", "3")
    launcher.run("dp2", *data.blend(), *FOUR_LAYERS, *save)
    return folder


@pytest.mark.parametrize("layout", ["tp2", "pp2", "pp2_vpp2", "tp2_pp2"])
def test_a_checkpoint_goes_on_as_one_process(
    launcher: Launcher, data: Data, checkpoint: Path, layout: str
) -> None:
    """From the start, stages differ from one process: Megatron gives each a seed of its own."""
    alone = launcher.run("dp1", *data.blend(), *FOUR_LAYERS)
    run = launcher.run(layout, *data.blend(), *FOUR_LAYERS, "--load", str(checkpoint))
    assert list(run.scalars["lm loss"]) == [4, 5, 6]
    assert list(run.scalars["lm loss"].values()) == pytest.approx(losses(alone)[3:], rel=1e-6)


def test_validation_is_logged(launcher: Launcher, data: Data) -> None:
    run = launcher.run("dp2", *data.blend(), *HELD_OUT)
    printed = [line for line in run.lines if line.head.startswith("validation loss")]
    assert [line.iteration for line in printed] == [3, 6, 6]
    written = run.scalars["lm loss validation"]
    assert written[3] == pytest.approx(printed[0].values["lm loss value"], rel=1e-6)


def test_a_blend_under_context_parallelism_fails_in_megatron(
    launcher: Launcher, data: Data
) -> None:
    """`dataset_id` has no token dimension to cut. The tests of the patch show that it then runs."""
    run = launcher.run("cp2", *data.blend(), check=False)
    assert [rank.code for rank in run.ranks] == [1, 1]
    for rank in run.ranks:
        assert "_get_batch_on_this_cp_rank_per_sequence_balancing" in rank.err
        assert "IndexError: tuple index out of range" in rank.err


def test_packs_train(launcher: Launcher, data: Data) -> None:
    """On two context ranks other positions are padded, so not as on one process."""
    losses(launcher.run("dp1", *data.sft()))
    tensor, context = (launcher.run(layout, *data.sft()) for layout in ("tp2_cp2", "cp2"))
    assert losses(tensor) == pytest.approx(losses(context), rel=1e-6)


def test_a_run_is_repeated_bit_by_bit(launcher: Launcher, data: Data) -> None:
    seen = (observe.steps, observe.weights, observe.random_state)
    runs = [
        launcher.run("dp2", *data.blend(), observe=seen, environ={"RUN": str(number)})
        for number in range(2)
    ]
    for first, second in zip(runs[0].ranks, runs[1].ranks, strict=True):
        assert first.seen == second.seen
        assert set(first.seen["steps"]) == {str(i + 1) for i in range(ITERATIONS)}
        assert set(first.seen["steps"]["1"]) == {"lm loss", "grad norm"}


def test_a_rank_that_hangs_is_killed_and_says_where(launcher: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(
        dedent("""\
        import os, time

        def wait_for_nobody():
            time.sleep(60)

        if os.environ["RANK"] == "0":
            raise SystemExit(3)
        wait_for_nobody()
        """)
    )
    run = launcher.run(Layout(2), script=script, check=False)
    assert [rank.code for rank in run.ranks] == [3, -signal.SIGKILL]
    assert [rank.killed for rank in run.ranks] == [False, True]
    assert "in wait_for_nobody" in run.failure
    with pytest.raises(AssertionError, match="wait_for_nobody"):
        launcher.run(Layout(2), script=script)
