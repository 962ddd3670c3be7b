"""Scripts that do what the metrics cannot follow: each is told so, by a warning or an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lm import oracle, windows
from megatron_lm.data import Data
from megatron_lm.launch import Launcher, Run, needs_megatron_training
from megatron_lm.test_channels_faults import external_script
from megatron_lm.test_channels_options import refused

pytestmark = needs_megatron_training

CHANNELS = ("--channels", *oracle.NAMES)
LIE = """
import warnings

warnings.simplefilter("always")  # not once per place, which would hide what is said again
real_loss_func = loss_func


def loss_func(loss_mask, output_tensor, model=None):
    loss, num_tokens, report = real_loss_func(loss_mask, output_tensor, model=model)
    report["lm loss"][0] *= 1.01
    return loss, num_tokens, report
"""
TWO_BATCHES = """
real_forward_step = forward_step


def forward_step(data_iterator, model):
    next(data_iterator)
    return real_forward_step(data_iterator, model)
"""
OWN_CUT = """
def get_batch_on_this_cp_rank(batch, *args, **kwargs):
    size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    for key, value in batch.items():
        if value is not None:
            batch[key] = value.chunk(size, dim=2 if key == "attention_mask" else 1)[rank]
    return batch
"""


@pytest.fixture(scope="module")
def lie(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Its loss function reports too much, and its data loader names no channel."""
    folder = tmp_path_factory.mktemp("lie")
    text = external_script(folder, "ids").read_text()
    named, marker = '"channels": torch.arange(rows) % 2', windows.MARKER
    assert text.count(named) == text.count(marker) == 1
    text = text.replace(named, '"channels": [None] * rows').replace(marker, LIE + marker)
    path = folder / "lie.py"
    path.write_text(text)
    args = ("--dataloader-type", "external", "--exit-interval", "3", *CHANNELS)
    return launcher.run("dp1", *args, patch=True, script=path, observe=(windows.micro_batches,))


def test_a_loss_function_that_lies_is_told_once(lie: Run) -> None:
    assert list(lie.scalars["unlabeled_tokens"]) == [1, 2, 3]
    assert lie.ranks[0].said.count("do not add up") == 1


def test_the_losses_are_those_of_the_tokens_all_the_same(lie: Run) -> None:
    """Of the tokens, not of the report."""
    for step, loss in lie.scalars["unlabeled_loss"].items():
        # By their tokens, all of these rows are of the web.
        wanted = windows.expected(lie, "train", 4 * step - 4, 4 * step)["web_loss"]
        assert loss == pytest.approx(wanted, rel=1e-6)
        assert lie.scalars["lm loss"][step] == pytest.approx(1.01 * wanted, rel=1e-5)


def test_a_window_without_any_channel_is_told(lie: Run) -> None:
    said = lie.ranks[0].said.splitlines()
    assert sum("all tokens" in line and "unlabeled" in line for line in said) == 1


def test_two_batches_in_one_forward_step(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    script = windows.script_with(tmp_path, "two_batches", TWO_BATCHES)
    run = launcher.run("dp1", *data.blend(), *CHANNELS, patch=True, script=script, check=False)
    said = refused(run)
    assert "ChannelError" in said and "took 2 batches from its data iterator" in said


def test_labels_cut_by_the_script(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    """Under context parallelism; the ids per row would be those of other tokens."""
    script = windows.script_with(tmp_path, "own_cut", OWN_CUT)
    args = (*data.single("web"), "--channels", "web")
    run = launcher.run("cp2", *args, patch=True, script=script, check=False)
    said = refused(run)
    assert "ChannelError" in said and "cut for context parallelism, but not by megatron" in said


def test_a_key_of_megatrons_own_is_refused(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    """What TensorBoard has under `lm loss` would be both."""
    config = tmp_path / "channels.yaml"
    config.write_text('metrics: [loss, tokens]\nkey_format: "{channel} {metric}"\n')
    args = ("--channels", "lm", "code", "math", "--channels-config", str(config))
    more = ("--exit-interval", "1")
    run = launcher.run("dp1", *data.blend(), *args, *more, patch=True, check=False)
    assert "lm loss" in refused(run)
