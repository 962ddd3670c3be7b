"""One run on two ranks in which much happens between two log lines, and what is logged of it.

Its evaluations come after each iteration; one dies and one reaches the limit of time. Each
evaluation but these ends with a forward pass whose losses are not asked for. It saves both kinds
of checkpoints.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_lm import oracle, windows
from megatron_lm.data import Data
from megatron_lm.launch import Launcher, Run, needs_megatron_training
from megatron_lm.layouts import ITERATIONS
from megatron_lm.oracle import NAMES

pytestmark = needs_megatron_training

METRICS = "loss, token_acc, ppl, tokens, samples, share, tokens_total, samples_total"
# On each of two ranks: in one iteration, and in an evaluation of two.
STEP, EVALUATION = 2, 4
COUNTS = ("_tokens", "_samples")
TOTALS = ("_tokens_total", "_samples_total")
EVAL_CHANNELS = ("web", "code")
EVAL_KEYS = tuple(f"eval_{name}_" for name in EVAL_CHANNELS)
NON_LOSS = """
real_loss_func = loss_func


def loss_func(loss_mask, output_tensor, model=None, non_loss_data=False):
    if non_loss_data:
        return {"outputs": output_tensor}
    return real_loss_func(loss_mask, output_tensor, model=model)


def write_outputs(collected, iteration, writer):
    writer.add_scalar("number of outputs", len(collected), iteration)


pretrain = partial(pretrain, process_non_loss_data_func=write_outputs)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of the run."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def run(
    launcher: Launcher, data: Data, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    place = tmp_path_factory.mktemp("gaps")
    config = place / "channels.yaml"
    config.write_text(f"metrics: [{METRICS}]\neval_channels: [{', '.join(EVAL_CHANNELS)}]\n")
    evaluation = ("--split", "80,20,0", "--eval-interval", "1", "--eval-iters", "2")
    # The pass for the outputs takes more of the validation set than Megatron has planned.
    again = ("--dataloader-type", "cyclic")
    kinds = ("--save-interval", "2", "--non-persistent-save-interval", "3")
    save = ("--save", str(folder), *kinds, "--non-persistent-ckpt-type", "global")
    return launcher.run(
        "dp2", *data.blend()[:-2], *evaluation, *again, *save, "--log-interval", "3",
        "--channels", *NAMES, "--channels-config", str(config),
        patch=True,
        script=windows.script_with(place, "non_loss", NON_LOSS),
        observe=(windows.micro_batches, windows.ended_on_the_way),
    )  # fmt: skip


def printed(run: Run, head: str) -> list[dict[str, float]]:
    """Our lines that begin with `head`, in their order."""
    return [line.values for line in run.lines if line.head == f"{head} channels"]


def without(values: dict[str, float], *endings: str) -> dict[str, float]:
    return {key: value for key, value in values.items() if not key.endswith(endings)}


def evaluated(run: Run, number: int) -> dict[str, float]:
    """What evaluation `number` must log of the channels that it logs."""
    found = windows.expected(run, f"eval {number}", 0, EVALUATION)
    return {f"eval_{k}": v for k, v in found.items() if k.startswith(EVAL_CHANNELS)}


def test_the_run_is_as_it_is_described(run: Run) -> None:
    first, last = (rank.seen["micro_batches"] for rank in run.ranks)
    # The last rank ran the forward pass for the outputs; the last evaluation is after training.
    assert [len(seen) for seen in first["eval"]] == [4, 3, 4, 2, 4, 4, 4]
    assert [len(seen) for seen in last["eval"]] == [6, 3, 6, 2, 6, 6, 6]
    assert list(run.scalars["number of outputs"]) == [1, 3, 5, 6]
    assert len(first["train"]) == len(last["train"]) == STEP * ITERATIONS


def test_windows_around_evaluations_that_end_early_are_exact(run: Run) -> None:
    for step, first in ((3, 0), (6, 3)):
        (values,) = printed(run, f"iteration {step:8d}")
        wanted = windows.expected(run, "train", STEP * first, STEP * step)
        assert set(wanted) == {f"{n}_{m}" for n in NAMES for m in METRICS.split(", ")[:-2]}
        assert without(values, *TOTALS) == pytest.approx(wanted, rel=1e-5)
        so_far = windows.expected(run, "train", 0, STEP * step)
        assert {k: v for k, v in values.items() if k.endswith(TOTALS)} == counts(so_far)


def test_evaluations_after_those_that_ended_early_are_exact(run: Run) -> None:
    """With none of their tokens, nor those of the pass for the outputs; and those log nothing."""
    lines = [line for line in run.lines if line.head.startswith("validation at iteration")]
    whole = [number for number in range(1, 8) if number not in (windows.DIES, windows.TIMES_OUT)]
    assert [line.iteration for line in lines] == [min(number, ITERATIONS) for number in whole]
    for line, number in zip(lines, whole, strict=True):
        logged = {k: v for k, v in line.values.items() if k.startswith(EVAL_KEYS)}
        assert without(logged, *TOTALS) == pytest.approx(evaluated(run, number), rel=1e-5)
    assert list(run.scalars["eval_web_loss"]) == [1, 3, 5, 6]


def test_the_first_line_has_the_ratios_of_an_interval_that_goes_on(run: Run) -> None:
    (values,) = printed(run, f"iteration {1:8d}")
    wanted = without(windows.expected(run, "train", 0, STEP), *COUNTS)
    assert without(values, *TOTALS) == pytest.approx(wanted, rel=1e-5)


def test_the_first_line_has_no_totals(run: Run) -> None:
    assert not any(key.endswith(TOTALS) for key in printed(run, f"iteration {1:8d}")[0])


def test_evaluations_log_no_totals(run: Run) -> None:
    assert not any(key.startswith("eval_") and key.endswith(TOTALS) for key in run.scalars)


def test_evaluations_log_the_channels_of_eval_channels(run: Run) -> None:
    keys = {key for key in run.scalars if key.startswith("eval_")}
    assert keys and all(key.startswith(EVAL_KEYS) for key in keys)


def test_totals_are_in_the_persistent_checkpoints_only(run: Run, folder: Path) -> None:
    """A folder that Megatron did not write would look like a checkpoint."""
    assert (folder / "non_persistent" / "iter_0000003").is_dir()
    wanted = [folder / f"iter_{step:07d}" for step in (2, 4, 6)]
    assert sorted(folder.glob("iter_*")) == wanted
    assert sorted(path.parent for path in folder.rglob("channel_metrics*.json")) == wanted


def test_a_resume_from_a_checkpoint_that_is_not_persistent_starts_at_zero(
    launcher: Launcher, data: Data, run: Run, folder: Path, tmp_path: Path
) -> None:
    """And says so: such a checkpoint has no totals."""
    shutil.copytree(folder / "non_persistent", tmp_path / "non_persistent")
    resumed = launcher.run(
        "dp2", *data.blend(), "--load", str(tmp_path), "--non-persistent-ckpt-type", "global",
        "--exit-interval", "4", "--channels", *NAMES, "--channels-metrics", *METRICS.split(", "),
        patch=True, observe=(windows.micro_batches,),
    )  # fmt: skip
    assert "at iteration 3" in resumed.ranks[0].out
    logged = {key: curve[4] for key, curve in resumed.scalars.items() if key.endswith(TOTALS)}
    assert logged and logged == counts(windows.expected(resumed, "train", 0))
    assert "written without channel metrics" in resumed.ranks[0].said


def test_totals_of_the_persistent_checkpoints_are_exact(run: Run, folder: Path) -> None:
    """In the middle of a window, before and after one that is not persistent."""
    for step in (2, 4, 6):
        wanted = counts(windows.expected(run, "train", 0, STEP * step))
        assert windows.saved_totals(folder / f"iter_{step:07d}") == wanted


# What another version of the library has left; nobody has counted this.
OLD = {
    "web": {"tokens_total": 1000, "samples_total": 10},
    "math": {"tokens_total": 3000, "samples_total": 30},
    "gone": {"tokens_total": 7, "samples_total": 1},
}
RARE_MATH = ("0.5", "0.45", "0.05")


@pytest.fixture(scope="module")
def old(run: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of iteration 2, with the totals in the file of that version."""
    place = tmp_path_factory.mktemp("old")
    shutil.copytree(folder / "iter_0000002", place / "iter_0000002")
    (place / "latest_checkpointed_iteration.txt").write_text("2")
    for path in place.rglob("channel_metrics*.json"):
        path.unlink()
    state = {"version": 1, "channels": OLD}
    (place / "iter_0000002" / "channel_metrics_totals.json").write_text(json.dumps(state))
    return place


@pytest.fixture(scope="module")
def resumed(
    launcher: Launcher, data: Data, old: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """One rank goes on from there, and logs each of its four iterations; saves the last."""
    pairs = zip(RARE_MATH, map(data.prefix, NAMES), strict=True)
    blend = [part for pair in pairs for part in pair]
    save = ("--save", str(tmp_path_factory.mktemp("resumed")), "--save-interval", "6")
    return launcher.run(
        "dp1", "--data-path", *blend, "--split", "100,0,0", "--load", str(old), *save,
        "--channels", *NAMES, "--channels-metrics", *METRICS.split(", "),
        patch=True, observe=(windows.micro_batches, save_folder),
    )  # fmt: skip


def save_folder() -> oracle.Result:
    """Where the run saved."""
    from megatron.training import get_args

    return lambda: get_args().save


def counts(values: dict[str, float]) -> dict[str, float]:
    """Those of tokens and samples, under the names of totals."""
    return {f"{key}_total": value for key, value in values.items() if key.endswith(COUNTS)}


def old_and_new(resumed: Run, last: int | None = None) -> dict[str, float]:
    """The totals of `OLD` and of the first `last` micro-batches since."""
    new = counts(windows.expected(resumed, "train", 0, last))
    before = {f"{name}_{key}": n for name, totals in OLD.items() for key, n in totals.items()}
    return {key: before.get(key, 0) + new.get(key, 0) for key in before | new}


def after_each_iteration(resumed: Run) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Per iteration: the totals that were logged, and those of all channels until then."""
    assert list(resumed.scalars["web_tokens_total"]) == [3, 4, 5, 6]
    return [
        (
            {k: v[step] for k, v in resumed.scalars.items() if k.endswith(TOTALS) and step in v},
            old_and_new(resumed, 4 * number),
        )
        for number, step in enumerate((3, 4, 5, 6), start=1)
    ]


def test_a_file_of_the_old_name_is_resumed(resumed: Run) -> None:
    """A channel that is in a window has its total there; it goes on after windows without it."""
    in_windows = []
    for number, (logged, wanted) in enumerate(after_each_iteration(resumed)):
        window = counts(windows.expected(resumed, "train", 4 * number, 4 * number + 4))
        in_windows.append("math_tokens_total" in window)
        assert {key: logged[key] for key in window} == {key: wanted[key] for key in window}
    # Absent, and there again.
    assert False in in_windows and True in in_windows[in_windows.index(False) :]


def test_the_checkpoint_keeps_the_totals_of_absent_channels(resumed: Run) -> None:
    last = Path(resumed.ranks[0].seen["save_folder"]) / "iter_0000006"
    assert windows.saved_totals(last) == old_and_new(resumed)


def test_a_channel_that_is_absent_has_no_total_in_the_line(resumed: Run) -> None:
    for number, (logged, _) in enumerate(after_each_iteration(resumed)):
        window = counts(windows.expected(resumed, "train", 4 * number, 4 * number + 4))
        assert logged.keys() == window.keys()


def test_the_new_file_has_the_new_name(resumed: Run) -> None:
    last = Path(resumed.ranks[0].seen["save_folder"]) / "iter_0000006"
    assert (last / "channel_metrics.json").exists()
    assert not (last / "channel_metrics_totals.json").exists()


def test_finetuning_starts_new_totals(launcher: Launcher, data: Data, old: Path) -> None:
    """`--finetune` takes the weights of a checkpoint, and begins at iteration 0."""
    run = launcher.run(
        "dp1", *data.blend(), "--load", str(old), "--finetune", "--exit-interval", "1",
        "--channels", *NAMES, "--channels-metrics", *METRICS.split(", "),
        patch=True, observe=(windows.micro_batches,),
    )  # fmt: skip
    assert "loaded checkpoint" in run.ranks[0].out
    logged = {key: curve[1] for key, curve in run.scalars.items() if key.endswith(TOTALS)}
    assert logged == counts(windows.expected(run, "train", 0))
    assert "written without channel metrics" not in run.ranks[0].said
