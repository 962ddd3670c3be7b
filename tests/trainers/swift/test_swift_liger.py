"""ms-swift with use_liger_kernel: metrics, with and without --enable_channel_loss, and no logits.

The oracle is ms-swift alone, whose own channel losses are counted on whole logits.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from hf_launch import Launch, launch
from liger_tools import needs_liger
from swift_files import CHANNELS

pytestmark = [
    needs_liger,
    pytest.mark.skipif(
        importlib.util.find_spec("swift") is None,
        reason="ms-swift is only in the main environment (Python 3.11): `make test` runs this",
    ),
]

KINDS = ("liger_padded", "liger_packing", "liger_padding_free", "liger_lora")
Log = list[dict[str, float]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("swift_liger", tmp_path_factory)


def windows(of_run: dict[str, Any], key: str = "loss") -> Log:
    found = [entry for entry in of_run["log"] if key in entry]
    assert found
    return found


def names_in(entry: dict[str, float], prefix: str) -> list[str]:
    return [name for name in CHANNELS if f"{prefix}{name}_loss" in entry]


def check_channels(log: Log, own: Log, flag: bool, prefix: str = "") -> None:
    """Losses and accuracies of channels against those that ms-swift counts on logits."""
    for ours, theirs in zip(log, own, strict=True):
        names = names_in(ours, prefix)
        assert names == [name for name in CHANNELS if f"{prefix}loss_{name}" in theirs] != []
        for name in names:
            # From the second window on, the weights differ by rounding.
            expected = pytest.approx(theirs[f"{prefix}loss_{name}"], rel=2e-5)
            assert ours[f"{prefix}{name}_loss"] == expected
            assert (f"{prefix}loss_{name}" in ours) == flag
            assert not flag or ours[f"{prefix}loss_{name}"] == expected
        right = sum(ours[f"{prefix}{n}_token_acc"] * ours[f"{prefix}{n}_share"] for n in names)
        assert right == pytest.approx(theirs[f"{prefix}token_acc"], abs=1e-6)
    assert max(value for entry in log for key, value in entry.items() if "token_acc" in key) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", ["on", "flag"])
def test_channels_are_those_of_ms_swift(runs: Launch, kind: str, run: str) -> None:
    (found,) = runs.ranks(kind)
    check_channels(windows(found[run]), windows(found["own"]), run == "flag")


@pytest.mark.parametrize("run", ["on", "flag"])
def test_evaluation(runs: Launch, run: str) -> None:
    (found,) = runs.ranks("liger_padded")
    logs = [windows(found[name], "eval_loss") for name in (run, "own")]
    check_channels(*logs, run == "flag", "eval_")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", ["on", "flag"])
def test_training_is_the_same_up_to_rounding(runs: Launch, kind: str, run: str) -> None:
    (found,) = runs.ranks(kind)
    for ours, theirs in zip(windows(found[run]), windows(found["off"]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    # Adam makes much of the rounding where a gradient is 0.
    assert found[run]["norms"] == pytest.approx(found["off"]["norms"], rel=1e-4)
    assert found[run]["random"] == found["off"]["random"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", ["on", "flag"])
def test_the_logits_never_exist(runs: Launch, kind: str, run: str) -> None:
    """Not in the evaluation either."""
    (found,) = runs.ranks(kind)
    assert found[run]["rows"] == found["off"]["rows"] < found["own"]["rows"] / 1.5


def test_weighted_tokens_are_left_to_ms_swift(runs: Launch) -> None:
    """It makes the logits for them, and says so; training is the same bit for bit."""
    (found,) = runs.ranks("liger_weighted")
    off, on = found["off"], found["on"]
    assert (on["weights"], on["random"], on["rows"]) == (off["weights"], off["random"], off["rows"])
    for ours, theirs in zip(windows(on), windows(off), strict=True):
        assert ours["loss"] == theirs["loss"]
        names = names_in(ours, "")
        assert names
        for name in names:
            assert ours[f"loss_{name}"] == pytest.approx(theirs[f"loss_{name}"], rel=1e-6)
