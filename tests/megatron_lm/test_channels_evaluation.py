"""Validation and test sets with `--channels`, and log intervals of several iterations."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest

from megatron_lm import oracle
from megatron_lm.data import Data
from megatron_lm.launch import Launcher, Run, needs_megatron_training
from megatron_lm.layouts import GLOBAL_BATCH, ITERATIONS, SEQ_LENGTH

pytestmark = needs_megatron_training

METRICS = ("--channels-metrics", "loss", "token_acc", "tokens", "samples", "share")
CHANNELS = ("--channels", *oracle.NAMES, *METRICS)
STEP_TOKENS = GLOBAL_BATCH * SEQ_LENGTH
EVERY_3 = ("--eval-interval", "3", "--eval-iters", "2")


def by_step(run: Run, prefix: str) -> dict[int, dict[str, float]]:
    """Our keys of one kind of evaluation, without the prefix: {3: {"web_loss": ...}}."""
    logs: dict[int, dict[str, float]] = {}
    for key, curve in run.scalars.items():
        if key.startswith(prefix):
            for step, value in curve.items():
                logs.setdefault(step, {})[key.removeprefix(prefix)] = value
    return logs


def train_logs(run: Run) -> dict[int, dict[str, float]]:
    names = tuple(f"{name}_" for name in oracle.NAMES)
    logs: dict[int, dict[str, float]] = {}
    for key, curve in run.scalars.items():
        if key.startswith(names):
            for step, value in curve.items():
                logs.setdefault(step, {})[key] = value
    return logs


@pytest.mark.parametrize("layout", ["dp1", "dp2", "tp2", "cp2", "tp2_pp2", "pp2_vpp2"])
def test_validation_adds_up_to_that_of_megatron(
    launcher: Launcher, data: Data, layout: str
) -> None:
    args = (*data.blend()[:-2], "--split", "80,20,0", *EVERY_3)
    run = launcher.run(layout, *args, *CHANNELS, patch=True)
    logs = by_step(run, "eval_")
    assert list(logs) == [3, 6]
    for step, log in logs.items():
        assert oracle.total_loss(log) == pytest.approx(
            run.scalars["lm loss validation"][step], rel=1e-5
        )
        counted = {key: value for key, value in log.items() if key.endswith("_tokens")}
        assert sum(counted.values()) == 2 * STEP_TOKENS
        assert all(counted.values())
    printed = [line for line in run.lines if line.head.startswith("validation at")]
    assert [line.iteration for line in printed][:2] == [3, 6]
    assert printed[0].values["eval_web_loss"] == pytest.approx(logs[3]["web_loss"], rel=1e-5)
    # The training windows go on around it.
    steps = train_logs(run)
    assert list(steps) == list(range(1, ITERATIONS + 1))
    assert [sum(v for k, v in log.items() if k.endswith("_tokens")) for log in steps.values()] == (
        [STEP_TOKENS] * ITERATIONS
    )


def test_evaluation_inside_a_window_changes_nothing_in_it(launcher: Launcher, data: Data) -> None:
    args = (*data.blend()[:-2], "--split", "80,20,0", "--log-interval", "3", "--eval-iters", "2")
    never = launcher.run("dp2", *args, "--eval-interval", "1000", *CHANNELS, patch=True)
    often = launcher.run("dp2", *args, "--eval-interval", "2", *CHANNELS, patch=True)
    assert list(by_step(often, "eval_")) == [2, 4, 6]
    assert train_logs(never) == train_logs(often)


def forward_only() -> oracle.Result:
    """Training steps as Megatron's main branch takes them with `--freeze-all-layers`."""
    from megatron.training import training

    step, kinds = training.train_step, []
    signature = inspect.signature(step)

    @functools.wraps(step)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        forward_backward = call.arguments["forward_backward_func"]

        def forward(**given: Any) -> Any:
            kinds.append("train")
            return forward_backward(**{**given, "forward_only": True})

        call.arguments["forward_backward_func"] = forward
        return step(*call.args, **call.kwargs)

    training.train_step = train_step
    return lambda: len(kinds)


def test_training_that_only_runs_forward_is_training(launcher: Launcher, data: Data) -> None:
    """`--freeze-all-layers`; only what `evaluate()` runs is validation."""
    args = (*data.blend()[:-2], "--split", "80,20,0", *EVERY_3, "--freeze-all-layers")
    run = launcher.run("dp2", *args, *CHANNELS, patch=True, observe=(forward_only,))
    assert [rank.seen["forward_only"] for rank in run.ranks] == [ITERATIONS] * 2
    logs = train_logs(run)
    assert list(logs) == list(range(1, ITERATIONS + 1))
    for step, log in logs.items():
        tokens = {n: log[f"{n}_tokens"] for n in oracle.NAMES if f"{n}_tokens" in log}
        assert sum(tokens.values()) == STEP_TOKENS
        total = sum(log[f"{name}_loss"] * count for name, count in tokens.items())
        assert total / STEP_TOKENS == pytest.approx(run.scalars["lm loss"][step], rel=1e-5)
    for log in by_step(run, "eval_").values():
        assert sum(log[f"{name}_tokens"] for name in oracle.NAMES) == 2 * STEP_TOKENS


def overflowing() -> oracle.Result:
    """`--moe-expert-rank-capacity-factor`, in evaluations: the first iteration of each runs
    again. Only the overflow is made up: it needs a GPU."""
    from megatron.training import get_args, training

    evaluate, runner = training.evaluate, training.PagedStashRunner
    init, calls, reruns = runner.__init__, [0], [0]

    def check_moe_overflow(self: Any) -> tuple[int, int, int]:
        calls[0] += 1
        again = calls[0] == 1
        reruns[0] += again
        return 0, int(again), 0

    @functools.wraps(evaluate)
    def evaluating(*args: Any, **kwargs: Any) -> Any:
        calls[0] = 0
        get_args().moe_expert_rank_capacity_factor = 1.0
        return evaluate(*args, **kwargs)

    def made(self: Any, *args: Any) -> None:
        # With the option, every config would ask for experts on a GPU.
        get_args().moe_expert_rank_capacity_factor = None
        init(self, *args)

    runner.__init__, runner.check_moe_overflow = made, check_moe_overflow
    training.evaluate = evaluating
    return lambda: reruns[0]


def test_an_evaluation_that_runs_an_iteration_again_counts_it_once(
    launcher: Launcher, data: Data
) -> None:
    args = (*data.blend()[:-2], "--split", "80,20,0", *EVERY_3)
    run = launcher.run("dp2", *args, *CHANNELS, patch=True, observe=(overflowing,))
    plain = launcher.run("dp2", *args, *CHANNELS, patch=True)
    assert [rank.seen["overflowing"] for rank in run.ranks] == [3, 3]
    assert by_step(run, "eval_") == by_step(plain, "eval_")
    for log in by_step(run, "eval_").values():
        assert sum(log[f"{name}_tokens"] for name in oracle.NAMES) == 2 * STEP_TOKENS
    assert train_logs(run) == train_logs(plain)


def test_the_test_set_has_its_own_prefix(launcher: Launcher, data: Data) -> None:
    args = (*data.blend()[:-2], "--split", "70,20,10", *EVERY_3)
    run = launcher.run("dp1", *args, *CHANNELS, "macro_loss", "worst_loss", patch=True)
    (log,) = by_step(run, "test_").values()
    losses = {name: log[f"{name}_loss"] for name in oracle.NAMES if f"{name}_loss" in log}
    assert log["macro_loss"] == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)
    (line,) = [line for line in run.ranks[-1].out.splitlines() if "test_macro_loss: " in line]
    worst = max(losses, key=losses.__getitem__)
    assert line.endswith(f"| worst channel: {worst} |")
    assert sum(log[f"{name}_tokens"] for name in oracle.NAMES) == 2 * STEP_TOKENS
    # The final validation is at the last iteration; its values stand beside the test set's.
    assert log["web_loss"] != by_step(run, "eval_")[6]["web_loss"]


def test_several_validation_sets(launcher: Launcher, data: Data) -> None:
    """Each data set of the validation blend is evaluated by itself, under keys of its own."""
    train = ("--train-data-path", *data.weighted("web", "code", split="train"))
    # Megatron wants no weights here, and takes an even number of entries for weights and paths.
    valid = ("--valid-data-path", *(data.prefix(name, "valid") for name in oracle.NAMES))
    several = (*EVERY_3, "--multiple-validation-sets", "--full-validation")
    names = ("--channels", "web", "code", *oracle.NAMES, *METRICS)
    run = launcher.run("dp2", *train, *valid, *several, *names, patch=True)
    wanted = {f"eval_{number}_{name}_tokens" for number, name in enumerate(oracle.NAMES)}
    assert {k for k in run.scalars if k.startswith("eval_") and k.endswith("_tokens")} == wanted
    for number, name in enumerate(oracle.NAMES):
        ours = run.scalars[f"eval_{number}_{name}_loss"]
        theirs = run.scalars[f"lm loss validation-{number}"]
        assert list(ours) == [3, 6]
        assert list(ours.values()) == pytest.approx([theirs[3], theirs[6]], rel=1e-5)


def test_an_interval_is_one_ratio_of_sums(launcher: Launcher, data: Data) -> None:
    """Of all its tokens; iteration 1 is logged at once and stays in its interval."""
    each = launcher.run("dp2", *data.blend(), *CHANNELS, patch=True)
    run = launcher.run("dp2", *data.blend(), "--log-interval", "3", *CHANNELS, patch=True)
    alone, windows = train_logs(each), train_logs(run)
    assert list(windows) == [1, 3, 6]
    # Its tokens and samples will be counted at the end of the interval.
    counts = ("_tokens", "_samples")
    assert windows[1] == {k: v for k, v in alone[1].items() if not k.endswith(counts)}
    for end in (3, 6):
        logs = [alone[step] for step in range(end - 2, end + 1)]
        tokens = {n: sum(log.get(f"{n}_tokens", 0) for log in logs) for n in oracle.NAMES}
        for name in oracle.NAMES:
            for metric in ("loss", "token_acc"):
                total = sum(
                    log[f"{name}_{metric}"] * log[f"{name}_tokens"]
                    for log in logs
                    if f"{name}_tokens" in log
                )
                assert windows[end][f"{name}_{metric}"] == pytest.approx(
                    total / tokens[name], rel=1e-5
                )
            assert windows[end][f"{name}_tokens"] == tokens[name]
            assert windows[end][f"{name}_share"] == pytest.approx(
                tokens[name] / (3 * STEP_TOKENS), rel=1e-6
            )
