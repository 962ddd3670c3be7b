"""`--channels` in every parallel layout: equal to the naive loop, to each other, to Megatron."""

from __future__ import annotations

import pytest

from megatron_lm import observe, oracle
from megatron_lm.data import Data
from megatron_lm.launch import Launcher, Run, needs_megatron_training
from megatron_lm.layouts import ITERATIONS, LAYOUTS

pytestmark = needs_megatron_training

METRICS = ("--channels-metrics", "loss", "token_acc", "tokens", "samples", "share")
CHANNELS = ("--channels", *oracle.NAMES, *METRICS)
SEEN = (observe.steps, observe.weights, observe.random_state, observe.collectives)
# Megatron gives each pipeline stage a seed of its own, so these start from other weights.
PIPELINE = ("pp2", "pp2_vpp2", "tp2_pp2")


def with_channels(launcher: Launcher, layout: str, *args: str) -> Run:
    return launcher.run(layout, *args, *CHANNELS, patch=True, observe=(*SEEN, oracle.sample_order))


def check_against_megatron(run: Run, rel: float = 1e-5) -> None:
    """The channels add up to `lm loss` in every iteration."""
    logs = oracle.logged(run)
    assert len(logs) == ITERATIONS
    totals = [oracle.total_loss(log) for log in logs]
    assert totals == pytest.approx(list(run.scalars["lm loss"].values()), rel=rel)
    assert "do not add up" not in "".join(rank.said for rank in run.ranks)


def test_one_process_equals_the_naive_loop(launcher: Launcher, data: Data) -> None:
    seen = (oracle.sample_order, oracle.token_losses)
    run = launcher.run("dp1", *data.blend(), *CHANNELS, patch=True, observe=seen)
    wanted = oracle.naive(*(run.ranks[0].seen[name.__name__] for name in seen))
    for log, expected in zip(oracle.logged(run), wanted, strict=True):
        assert log == pytest.approx(expected, rel=1e-6)
    # Not every channel is in every iteration, and one that is not is absent.
    assert {len(log) for log in wanted} == {len(log) for log in oracle.logged(run)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_blend(launcher: Launcher, data: Data, layout: str) -> None:
    run = with_channels(launcher, layout, *data.blend())
    check_against_megatron(run)
    orders = [rank.seen["sample_order"] for rank in run.ranks if rank.seen["sample_order"]]
    for log, start in zip(oracle.logged(run), range(0, len(orders[0]), 8), strict=True):
        ids = orders[0][start : start + 8]
        for channel, name in enumerate(oracle.NAMES):
            assert log.get(f"{name}_samples", 0) == ids.count(channel)
            assert log.get(f"{name}_tokens", 0) == 64 * ids.count(channel)
    if layout not in PIPELINE:
        alone = with_channels(launcher, "dp1", *data.blend())
        for log, expected in zip(oracle.logged(run), oracle.logged(alone), strict=True):
            assert log == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_unchanged(launcher: Launcher, data: Data, layout: str) -> None:
    """Bit by bit; a blend under context parallelism does not run without the patch."""
    is_cut = "cp2" in layout
    args = data.single("web") if is_cut else data.blend()
    names = ("web",) if is_cut else oracle.NAMES
    off = launcher.run(layout, *args, observe=SEEN)
    on = launcher.run(layout, *args, "--channels", *names, patch=True, observe=SEEN)
    for rank_off, rank_on in zip(off.ranks, on.ranks, strict=True):
        for what in ("steps", "weights", "random_state"):
            assert rank_off.seen[what] == rank_on.seen[what], what
    assert off.ranks[0].seen["weights"] and off.ranks[-1].seen["steps"]


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2", "tp2_pp2", "tp2_cp2"])
def test_one_collective_per_log_interval(launcher: Launcher, data: Data, layout: str) -> None:
    """More than Megatron's own: one all-reduce of all ranks per interval, and one in the first, for
    the names; with accuracy and tensor parallelism, one of the tensor-parallel ranks per
    micro-batch."""
    args = data.single("web")
    quiet = ("--channels", "web", "--channels-metrics", "loss", "tokens", "share")
    loud = ("--channels", "web")
    runs = [launcher.run(layout, *args, observe=SEEN)]
    runs += [launcher.run(layout, *args, *ours, patch=True, observe=SEEN) for ours in (quiet, loud)]
    size = LAYOUTS[layout].ranks
    for off, without, with_accuracy in zip(*(run.ranks for run in runs), strict=True):
        counts = [rank.seen["collectives"] for rank in (off, without, with_accuracy)]
        assert extra(counts[1], counts[0]) == {f"all_reduce/{size}": ITERATIONS + 1}
        more = extra(counts[2], counts[1])
        assert set(more) <= {"all_reduce/2"}
    # Only the last stage has logits: micro-batches per iteration x iterations.
    is_tensor_parallel = "tp2" in layout
    assert bool(more) == is_tensor_parallel


def extra(counts: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {key: n - before.get(key, 0) for key, n in counts.items() if n != before.get(key, 0)}


@pytest.mark.parametrize("layout", ["dp2", "tp2", "cp2", "tp2_cp2"])
def test_inter_document_masking(launcher: Launcher, data: Data, layout: str) -> None:
    masked = (*data.blend(), "--dataloader-inter-document-masking")
    run = with_channels(launcher, layout, *masked)
    check_against_megatron(run)
    alone = with_channels(launcher, "dp1", *masked)
    for log, expected in zip(oracle.logged(run), oracle.logged(alone), strict=True):
        assert log == pytest.approx(expected, rel=1e-5)


def test_loss_options_of_megatron_change_nothing(launcher: Launcher, data: Data) -> None:
    plain = with_channels(launcher, "tp2", *data.blend())
    for option in ("--calculate-per-token-loss", "--cross-entropy-loss-fusion"):
        run = with_channels(launcher, "tp2", *data.blend(), option)
        check_against_megatron(run)
        assert oracle.logged(run)[0] == pytest.approx(oracle.logged(plain)[0], rel=1e-5)


def test_losses_beside_the_language_model_are_left_out(launcher: Launcher, data: Data) -> None:
    mtp = with_channels(
        launcher, "tp2", *data.blend(), "--mtp-num-layers", "1", "--position-embedding-type", "rope"
    )
    check_against_megatron(mtp)
    assert "mtp_1 loss" in mtp.scalars
    moe = with_channels(
        launcher, "dp2", *data.blend(), "--num-experts", "4", "--disable-bias-linear",
        "--expert-model-parallel-size", "2", "--moe-aux-loss-coeff", "0.1",
    )  # fmt: skip
    check_against_megatron(moe)
    assert any("load_balancing" in key for key in moe.scalars)
