"""The options: the names of the data sets, where values are written, what is refused at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lm import oracle
from megatron_lm.data import Data
from megatron_lm.launch import Launcher, Run, needs_megatron_training
from megatron_lm.layouts import GLOBAL_BATCH, ITERATIONS, SEQ_LENGTH

pytestmark = needs_megatron_training

TOKENS = GLOBAL_BATCH * SEQ_LENGTH
COUNTS = ("--channels-metrics", "loss", "tokens", "samples")


def tokens(run: Run) -> dict[str, float]:
    """Tokens over the run by channel, without those of evaluations."""
    return {
        key.removesuffix("_tokens"): sum(curve.values())
        for key, curve in run.scalars.items()
        if key.endswith("_tokens") and not key.startswith(("eval_", "test_"))
    }


def of_order(run: Run, names: tuple[str, ...]) -> dict[str, int]:
    """The same, from Megatron's own index of the blend."""
    order = run.ranks[0].seen["sample_order"]
    return {name: SEQ_LENGTH * order.count(i) for i, name in enumerate(names)}


def refused(run: Run) -> str:
    """What rank 0 said; every rank ended by itself, before the first iteration."""
    assert all(rank.code not in {0, -9} and not rank.killed for rank in run.ranks), run.ranks
    assert not run.steps
    return run.ranks[0].err


def test_names_go_with_the_order_of_the_blend(launcher: Launcher, data: Data) -> None:
    seen = (oracle.sample_order,)
    args = (*data.blend("math", "web"), "--channels", "m", "w", *COUNTS)
    run = launcher.run("dp2", *args, patch=True, observe=seen)
    assert tokens(run) == of_order(run, ("m", "w"))


def test_names_are_taken_from_the_paths(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    """As short as they stay different."""
    other = Data(tmp_path / "other")
    blend = ["--data-path", "0.4", data.prefix("web"), "0.3", other.prefix("web")]
    blend += ["0.3", data.prefix("code"), "--split", "100,0,0"]
    seen = (oracle.sample_order,)
    run = launcher.run("dp1", *blend, "--channels", *COUNTS, patch=True, observe=seen)
    names = (f"{data.folder.name}/web", "other/web", "code")
    assert tokens(run) == of_order(run, names)


def test_one_name_for_two_data_sets_is_one_channel(
    launcher: Launcher, data: Data, tmp_path: Path
) -> None:
    """And one label of two channels, from `--channels-axes`. A channel may have no label."""
    axes = tmp_path / "axes.yaml"
    axes.write_text("kind: {text: all, code: all}\nformal: {code: yes it is}\n")
    args = (*data.blend(), "--channels", "text", "code", "text", "--channels-axes", str(axes))
    seen = (oracle.sample_order, oracle.token_losses)
    run = launcher.run("dp1", *args, *COUNTS, patch=True, observe=seen)
    order, rows = (run.ranks[0].seen[name.__name__] for name in seen)
    no, yes = "formal/unlabeled", "formal/yes_it_is"
    for names in (("text", "code", "text"), ("kind/all",) * 3, (no, yes, no)):
        wanted = oracle.naive(order, rows, names)
        for log, expected in zip(oracle.logged(run, names), wanted, strict=True):
            counted = {k: v for k, v in expected.items() if k.endswith(COUNTS[1:])}
            assert log == pytest.approx(counted, rel=1e-6)
    by_set = of_order(run, ("text", "code", "text2"))
    channels = {name: n for name, n in tokens(run).items() if "/" not in name}
    assert channels == {"text": by_set["text"] + by_set["text2"], "code": by_set["code"]}


def test_files_of_arguments(launcher: Launcher, data: Data) -> None:
    for args in (data.data_args_file("web", "code"), data.blend("web", "code")):
        run = launcher.run(
            "dp1", *args, "--channels", *COUNTS, patch=True, observe=(oracle.sample_order,)
        )
        assert tokens(run) == of_order(run, ("web", "code"))


@pytest.mark.parametrize("in_file", [False, True], ids=["options", "file"])
def test_splits_with_data_sets_of_their_own(launcher: Launcher, data: Data, in_file: bool) -> None:
    """Names unite; both splits' channels are logged."""
    blends = data.per_split_file if in_file else data.per_split
    args = (*blends(train=("web", "code"), valid=("code", "math")), *COUNTS)
    evaluation = ("--eval-interval", "6", "--eval-iters", "1")
    # Without names: from the paths, which hold the split's name.
    run = launcher.run("dp1", *args, *evaluation, "--channels", patch=True)
    assert set(tokens(run)) == {"web_train", "code_train"}
    assert run.scalars["eval_code_valid_tokens"][6] + run.scalars["eval_math_valid_tokens"][6] == (
        TOKENS
    )
    # Both blends have two data sets: the names go with each blend's order.
    named = launcher.run("dp1", *args, *evaluation, "--channels", "a", "b", patch=True)
    assert tokens(named) == {
        "a": tokens(run)["web_train"],
        "b": tokens(run)["code_train"],
    }
    assert named.scalars["eval_a_tokens"][6] == run.scalars["eval_code_valid_tokens"][6]
    # One name per file.
    each = launcher.run("dp1", *args, *evaluation, "--channels", "a", "b", "c", "d", patch=True)
    assert tokens(each) == tokens(named)
    assert each.scalars["eval_c_tokens"] == named.scalars["eval_a_tokens"]


def test_one_data_set_is_one_channel(launcher: Launcher, data: Data) -> None:
    run = launcher.run("dp1", *data.single("code"), "--channels", *COUNTS, patch=True)
    assert tokens(run) == {"code": TOKENS * ITERATIONS}
    assert run.scalars["code_loss"] == pytest.approx(run.scalars["lm loss"], rel=1e-6)


def test_mock_data_is_one_channel(launcher: Launcher, data: Data) -> None:
    run = launcher.run("dp1", *data.mock(), "--channels", *COUNTS, patch=True)
    assert tokens(run) == {"mock": TOKENS * ITERATIONS}
    two = launcher.run("dp1", *data.mock(), "--channels", "a", "b", patch=True, check=False)
    assert "--channels got 2 names (a, b), but --mock-data is one data set" in refused(two)


def test_a_file_configures(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    path = tmp_path / "channels.yaml"
    path.write_text('metrics: [loss, tokens, ppl]\nkey_format: "{metric}/{channel}"\n')
    args = (*data.blend(), "--channels", *oracle.NAMES, "--channels-config", str(path))
    run = launcher.run("dp1", *args, patch=True)
    assert {key for key in run.scalars if "/" in key} >= {"loss/web", "tokens/code", "ppl/math"}
    assert not any("token_acc" in key for key in run.scalars)


def test_the_log_and_tensorboard_have_the_same(launcher: Launcher, data: Data) -> None:
    args = (*data.blend(), "--channels", *oracle.NAMES)
    run = launcher.run("tp2_pp2", *args, patch=True)
    for iteration in range(1, ITERATIONS + 1):
        for name in oracle.NAMES:
            for metric in ("loss", "token_acc", "tokens", "share"):
                written = run.scalars[f"{name}_{metric}"].get(iteration)
                printed = run.steps[iteration].get(f"{name}_{metric}")
                assert printed == (None if written is None else pytest.approx(written, rel=1e-5))
    # A channel that an iteration has no tokens of is absent from it, not zero.
    assert all(
        value > 0 for name in oracle.NAMES for value in run.scalars[f"{name}_tokens"].values()
    )
    # Only the last rank writes.
    assert not any("channels |" in rank.out for rank in run.ranks[:-1])


def wandb_history() -> oracle.Result:
    """What is handed to W&B's writer, whose own file a test of the trackers reads."""
    import wandb

    seen: list[dict[str, object]] = []
    run: Any = wandb.Run
    log = run.log

    def remembering(self: Any, values: dict[str, Any], step: int | None = None) -> None:
        plain = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        seen.append({**plain, "at": step})
        log(self, values, step)

    run.log = remembering
    return lambda: seen


def test_wandb_has_them(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    args = (*data.blend(), "--channels", *oracle.NAMES)
    ours = ("--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", str(tmp_path))
    run = launcher.run(
        "tp2", *args, *ours, patch=True, observe=(wandb_history,), environ={"WANDB_MODE": "offline"}
    )
    written = [values for values in run.ranks[-1].seen["wandb_history"] if "web_loss" in values]
    assert [values["at"] for values in written] == list(run.scalars["web_loss"])
    assert [values["web_loss"] for values in written] == pytest.approx(
        list(run.scalars["web_loss"].values()), rel=1e-6
    )
    assert not run.ranks[0].seen["wandb_history"]
    assert list(tmp_path.rglob("*.wandb"))


def test_a_wrong_number_of_names_lists_the_data_sets(launcher: Launcher, data: Data) -> None:
    args = (*data.blend(), "--channels", "web", "code")
    said = refused(launcher.run("tp2", *args, patch=True, check=False))
    assert "--channels got 2 names (web, code), but the blend has 3 data sets" in said
    for name in oracle.NAMES:
        assert data.prefix(name) in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--channels", "--channels-metrics", "los"), "los"),
        (("--channels-metrics", "loss"), "--channels-metrics was given without --channels"),
        (("--channels", "a b", "a_b", "c"), "a_b"),
        (("--channels", "--channels-config", "no.yaml"), "no.yaml"),
    ],
    ids=["metric", "alone", "collide", "file"],
)
def test_options_that_cannot_be_followed(
    launcher: Launcher, data: Data, args: tuple[str, ...], said: str
) -> None:
    run = launcher.run("dp1", *data.blend(), *args, patch=True, check=False)
    assert said in refused(run)
    assert "ConfigError" in refused(run) or "ChannelError" in refused(run)


@pytest.mark.parametrize(
    "graphs",
    [
        ("--cuda-graph-impl", "full_iteration"),
        ("--cuda-graph-impl", "local", "--cuda-graph-scope", "full_iteration"),
        ("--enable-cuda-graph", "--cuda-graph-scope", "full_iteration"),
    ],
    ids=["impl", "scope", "enable"],
)
def test_graphs_of_whole_iterations_are_refused(
    launcher: Launcher, data: Data, graphs: tuple[str, ...]
) -> None:
    """Megatron makes the first spelling of the others; what it asks for with them is there."""
    needed = ("--no-check-for-nan-in-loss-and-grad", "--te-rng-tracker")
    args = (*data.blend(), "--channels", *graphs, *needed)
    said = refused(launcher.run("dp1", *args, patch=True, check=False))
    assert "channel metrics do not work with CUDA graphs of a full iteration" in said


def test_a_typo_in_eval_channels(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    """The data options have named all channels, so it is known at the start."""
    config = tmp_path / "channels.yaml"
    config.write_text("eval_channels: [wbe]\n")
    args = ("--channels", *oracle.NAMES, "--channels-config", str(config))
    run = launcher.run("dp1", *data.blend(), *args, patch=True, check=False)
    assert "did you mean 'web'" in refused(run)


def test_without_the_patch_megatron_does_not_know_the_option(
    launcher: Launcher, data: Data
) -> None:
    run = launcher.run("dp1", *data.blend(), "--channels", "a", check=False)
    assert "unrecognized arguments: --channels a" in refused(run)


def test_without_the_option_the_patch_does_nothing(launcher: Launcher, data: Data) -> None:
    run = launcher.run("dp1", *data.blend(), patch=True)
    plain = launcher.run("dp1", *data.blend())
    assert run.scalars["lm loss"] == plain.scalars["lm loss"]
    assert set(run.scalars) == set(plain.scalars)
    assert "channels |" not in run.ranks[0].out
