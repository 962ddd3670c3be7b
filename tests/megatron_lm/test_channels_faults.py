"""Iterations that are run again or skipped, losses that are not finite, faults in the metrics."""

from __future__ import annotations

import functools
import inspect
import math
from pathlib import Path
from textwrap import dedent
from typing import Any

import faults
import pytest

from megatron_lm import observe, oracle
from megatron_lm.data import Data
from megatron_lm.launch import Launcher, Run, default_script, needs_megatron_training
from megatron_lm.layouts import GLOBAL_BATCH, ITERATIONS, SEQ_LENGTH

pytestmark = needs_megatron_training

METRICS = ("--channels-metrics", "loss", "tokens", "samples", "tokens_total")
CHANNELS = ("--channels", *oracle.NAMES, *METRICS)
STEP_TOKENS = GLOBAL_BATCH * SEQ_LENGTH


def ours(run: Run) -> dict[str, dict[int, float]]:
    names = tuple(f"{name}_" for name in oracle.NAMES)
    return {key: curve for key, curve in run.scalars.items() if key.startswith(names)}


def num_forwards() -> oracle.Result:
    """How often this rank's loop ran over an iteration's micro-batches."""
    from megatron.training import training

    calls: list[bool] = []
    get = training.get_forward_backward_func

    @functools.wraps(get)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        run = get(*args, **kwargs)

        @functools.wraps(run)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(True)
            return run(*args, **kwargs)

        return counted

    training.get_forward_backward_func = get_forward_backward_func
    return lambda: len(calls)


def run_twice() -> oracle.Result:
    """In 0.19.2 the option is called report_stats, and its mode report_determinism_stats."""
    from megatron.core.rerun_state_machine import RerunMode

    RerunMode._value2member_map_["report_stats"] = RerunMode.REPORT_DETERMINISM_STATS
    return lambda: None


def test_an_iteration_that_is_run_again_counts_once(launcher: Launcher, data: Data) -> None:
    plain = launcher.run("dp2", *data.blend(), *CHANNELS, patch=True)
    twice = ("--rerun-mode", "report_stats")
    again = launcher.run(
        "dp2", *data.blend(), *CHANNELS, *twice, patch=True, observe=(num_forwards, run_twice)
    )
    assert [rank.seen["num_forwards"] for rank in again.ranks] == [2 * ITERATIONS] * 2
    assert ours(again) == ours(plain)


def skipped() -> oracle.Result:
    """The iterations that the optimizer skipped."""
    from megatron.training import training

    log, found = training.training_log, []
    signature = inspect.signature(log)

    @functools.wraps(log)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given["skipped_iter"]:
            found.append(given["iteration"])
        return log(*args, **kwargs)

    training.training_log = training_log
    return lambda: found


def test_a_skipped_iteration_is_left_out(launcher: Launcher, data: Data) -> None:
    """fp16: the first loss scale overflows, and is halved until it does not."""
    scale = ("--fp16", "--initial-loss-scale", str(2.0**20), "--hysteresis", "1")
    args = (*data.blend(), *CHANNELS, *scale)
    run = launcher.run("dp2", *args, patch=True, observe=(skipped,))
    left_out = run.ranks[0].seen["skipped"]
    assert 0 < len(left_out) < ITERATIONS
    per_step = dict.fromkeys(range(1, ITERATIONS + 1), 0.0)
    for name in oracle.NAMES:
        for step, count in run.scalars[f"{name}_tokens"].items():
            per_step[step] += count
    assert per_step == {step: STEP_TOKENS * (step not in left_out) for step in per_step}
    final = sum(run.scalars[f"{name}_tokens_total"][ITERATIONS] for name in oracle.NAMES)
    assert final == STEP_TOKENS * (ITERATIONS - len(left_out))


def one_nan_token() -> oracle.Result:
    """The first token loss of the third micro-batch is NaN, after the gradient is known."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    calls: list[None] = []
    compute = LanguageModule.compute_language_model_loss

    @functools.wraps(compute)
    def spoiled(self: Any, labels: Any, logits: Any) -> Any:
        losses = compute(self, labels, logits)
        calls.append(None)
        if len(calls) == 3:
            losses = losses.clone()
            losses[0, 0] = math.nan
        return losses

    LanguageModule.compute_language_model_loss = spoiled
    return lambda: len(calls)


def test_a_loss_that_is_not_finite_is_counted_apart(launcher: Launcher, data: Data) -> None:
    args = (*data.blend(), *CHANNELS, "--no-check-for-nan-in-loss-and-grad", "--exit-interval", "1")
    seen = (one_nan_token, oracle.sample_order)
    run = launcher.run("dp1", *args, patch=True, observe=seen)
    # Micro-batches of two rows: the third begins with the fifth.
    name = oracle.NAMES[run.ranks[0].seen["sample_order"][4]]
    assert run.scalars[f"{name}_nonfinite"] == {1: 1.0}
    assert math.isfinite(run.scalars[f"{name}_loss"][1])
    count = run.ranks[0].seen["sample_order"][:GLOBAL_BATCH].count(oracle.NAMES.index(name))
    assert run.scalars[f"{name}_tokens"] == {1: count * SEQ_LENGTH}


def wrong_loss_mask() -> oracle.Result:
    """The script binds a mask of another shape than the losses."""
    faults.install("find Megatron's loss mask", lambda find, loss_func: find(loss_func)[:, :-1])
    return lambda: None


@pytest.mark.parametrize("layout", ["tp2_pp2", "dp2"])
def test_a_fault_stops_every_rank(launcher: Launcher, data: Data, layout: str) -> None:
    args = (*data.blend(), *CHANNELS)
    run = launcher.run(layout, *args, patch=True, observe=(wrong_loss_mask,), check=False)
    first = run.ranks[run.ended[0]]
    assert first.code == 1
    assert "loss_mask" in first.err and "BoundaryError" in first.err
    assert all(rank.code for rank in run.ranks)


def test_a_fault_may_end_the_metrics_only(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    config = tmp_path / "warn.yaml"
    config.write_text("on_error: warn\nmetrics: [loss, tokens]\n")
    given = ("--channels", *oracle.NAMES, "--channels-config", str(config))
    seen = (observe.steps, observe.weights)
    plain = launcher.run("tp2_pp2", *data.blend(), observe=seen)
    run = launcher.run(
        "tp2_pp2", *data.blend(), *given, patch=True, observe=(*seen, wrong_loss_mask)
    )
    for rank, rank_plain in zip(run.ranks, plain.ranks, strict=True):
        assert rank.seen["steps"] == rank_plain.seen["steps"]
        assert rank.seen["weights"] == rank_plain.seen["weights"]
    assert not ours(run)
    said = "".join(rank.said for rank in run.ranks)
    # Once per rank that counts: tensor-parallel rank 0 of the last stage has the losses.
    assert said.count("training goes on: BoundaryError: loss_mask of shape [2, 63]") == 1


EXTERNAL = """\
import torch
from megatron.training import get_args

def batches(make_channels):
    generator = torch.Generator().manual_seed(0)
    while True:
        args = get_args()
        size = (args.micro_batch_size, args.seq_length + 1)
        rows = torch.randint(0, 250, size, generator=generator)
        batch = {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "loss_mask": torch.ones(args.micro_batch_size, args.seq_length),
            "attention_mask": torch.ones(1, 1, args.seq_length, args.seq_length).tril() < 0.5,
            "position_ids": torch.arange(args.seq_length).repeat(args.micro_batch_size, 1),
        }
        yield {**batch, **make_channels(args.micro_batch_size)}

def make(kind):
    if kind == "ids":
        return lambda rows: {"channels": torch.arange(rows) % 2}
    if kind == "names":
        return lambda rows: {"channels": ["web" if row % 2 else "code" for row in range(rows)]}
    if kind == "outside":
        return lambda rows: {"channels": torch.full((rows,), 7)}
    return lambda rows: {}
"""


def external_script(tmp_path: Path, kind: str) -> Path:
    """The script of the tests with a data loader of its own, whose batches have channels."""
    text = default_script().read_text()
    provider = dedent(f"""
        def datasets_provider(num_samples, vp_stage=None):
            from megatron.core import mpu
            if mpu.get_tensor_model_parallel_rank() != 0:
                return None, None, None
            return batches(make({kind!r})), None, None
    """)
    marker = 'if __name__ == "__main__":'
    assert text.count(marker) == 1
    before, after = text.split(marker)
    path = tmp_path / f"external_{kind}.py"
    path.write_text(before + EXTERNAL + provider + marker + after)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ids", None),
        ("names", None),
        ("outside", "channels of the batch must be -1 (unlabeled) or 0 to 2"),
        ("none", "the batch has neither channel_ids, channels nor dataset_id"),
    ],
)
def test_a_data_loader_of_the_users_own(
    launcher: Launcher, tmp_path: Path, kind: str, said: str | None
) -> None:
    script = external_script(tmp_path, kind)
    args = ("--dataloader-type", "external", "--channels", *oracle.NAMES)
    run = launcher.run("tp2", *args, *METRICS, patch=True, script=script, check=said is None)
    if said is not None:
        assert all(rank.code for rank in run.ranks)
        assert said in "".join(rank.err for rank in run.ranks)
        return
    half = STEP_TOKENS / 2
    assert list(run.scalars["web_tokens"].values()) == [half] * ITERATIONS
    assert list(run.scalars["code_tokens"].values()) == [half] * ITERATIONS
