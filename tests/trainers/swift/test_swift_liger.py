"""ms-swift with use_liger_kernel: metrics, with and without --enable_channel_loss, and no logits.

The oracle is ms-swift alone, whose own channel losses are counted on whole logits. Liger's kernels
run in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from liger_tools import LOSS_ONLY, Largest, needs_liger
from rank_cases import Case, RanksOf, case
from swift_files import CHANNELS, arguments, make_data, make_model
from swift_tools import INTERPRETED, ON, needs_swift, run

from channel_metrics.demo.tiny import byte_tokenizer

pytestmark = [needs_liger, needs_swift]
alone = case(INTERPRETED, ranks=1)

Log = list[dict[str, float]]


LIGER: dict[str, Any] = {"use_liger_kernel": True, "liger_kernel_config": LOSS_ONLY}
# The interpreter takes its time for every token.
SMALL = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 128, "system": "be"}
_shared: dict[str, Any] = {}


def _given(folder: Path, data: str = "plain", **overrides: Any) -> dict[str, Any]:
    if not _shared:
        base = folder.parent / "swift_liger"
        base.mkdir()
        _shared.update(model=make_model(base / "model"), data=make_data(base))
        # So that some of its predictions are right.
        trained = _given(base, max_steps=12, learning_rate=3e-2, per_device_train_batch_size=4)
        run(trained, None)["trainer"].model.save_pretrained(_shared["model"])
    return arguments(_shared["model"], _shared["data"][data], folder, **(SMALL | overrides))


def _run(given: dict[str, Any], metrics: Any) -> dict[str, Any]:
    """The log, the weights, and how many rows of logits existed at once."""
    with Largest(len(byte_tokenizer())) as largest:
        found = run(given, metrics)
    parameters = found.pop("trainer").model.parameters()
    norms = [float(p.detach().double().norm()) for p in parameters if p.requires_grad]
    return found | {"norms": norms, "rows": largest.num_rows}


def _compared(folder: Path, **kind: Any) -> dict[str, Any]:
    """own: the channel losses of ms-swift alone, which makes the logits for them. off: ms-swift
    alone with Liger. on, flag: with Liger and metrics, without and with the flag."""

    def given(flag: bool, **more: Any) -> dict[str, Any]:
        return _given(folder, enable_channel_loss=flag, **kind, **more)

    return {
        "own": _run(given(True), None),
        "off": _run(given(False, **LIGER), None),
        "on": _run(given(False, **LIGER), ON),
        "flag": _run(given(True, **LIGER), ON),
    }


@alone
def liger_padded(folder: Path) -> Any:
    """The model keeps the last positions; and an evaluation."""
    _given(folder)
    evaluation = {
        "val_dataset": [str(_shared["data"]["plain"]) + "#5"],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 3,
    }
    return _compared(folder, **evaluation)


@alone
def liger_packing(folder: Path) -> Any:
    """The model keeps the supervised positions."""
    return _compared(folder, packing=True, per_device_train_batch_size=1)


@alone
def liger_padding_free(folder: Path) -> Any:
    return _compared(folder, padding_free=True, use_logits_to_keep=False)


@alone
def liger_lora(folder: Path) -> Any:
    return _compared(folder, tuner_type="lora", lora_rank=2, target_modules=["all-linear"])


KINDS = (liger_padded, liger_packing, liger_padding_free, liger_lora)


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
@pytest.mark.parametrize("run_name", ["on", "flag"])
def test_channels_are_those_of_ms_swift(ranks_of: RanksOf, kind: Case, run_name: str) -> None:
    (found,) = ranks_of(kind)
    check_channels(windows(found[run_name]), windows(found["own"]), run_name == "flag")


@pytest.mark.parametrize("run_name", ["on", "flag"])
def test_evaluation(ranks_of: RanksOf, run_name: str) -> None:
    (found,) = ranks_of(liger_padded)
    ours, theirs = (windows(found[name], "eval_loss") for name in (run_name, "own"))
    check_channels(ours, theirs, run_name == "flag", "eval_")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run_name", ["on", "flag"])
def test_training_is_the_same_up_to_rounding(ranks_of: RanksOf, kind: Case, run_name: str) -> None:
    (found,) = ranks_of(kind)
    for ours, theirs in zip(windows(found[run_name]), windows(found["off"]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    # Adam makes much of the rounding where a gradient is 0.
    assert found[run_name]["norms"] == pytest.approx(found["off"]["norms"], rel=1e-4)
    assert found[run_name]["random"] == found["off"]["random"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run_name", ["on", "flag"])
def test_the_logits_never_exist(ranks_of: RanksOf, kind: Case, run_name: str) -> None:
    """Not in the evaluation either."""
    (found,) = ranks_of(kind)
    assert found[run_name]["rows"] == found["off"]["rows"] < found["own"]["rows"] / 1.5


@alone
def liger_weighted(folder: Path) -> Any:
    """Weighted tokens: ms-swift itself makes the logits."""
    given = _given(folder, "react", loss_scale="react", max_length=256, **LIGER)
    return {"off": _run(given, None), "on": _run(given, ON)}


def test_weighted_tokens_are_left_to_ms_swift(ranks_of: RanksOf) -> None:
    """It makes the logits for them, and says so; training is the same bit for bit."""
    (found,) = ranks_of(liger_weighted)
    off, on = found["off"], found["on"]
    assert (on["weights"], on["random"], on["rows"]) == (off["weights"], off["random"], off["rows"])
    for ours, theirs in zip(windows(on), windows(off), strict=True):
        assert ours["loss"] == theirs["loss"]
        names = names_in(ours, "")
        assert names
        for name in names:
            assert ours[f"loss_{name}"] == pytest.approx(theirs[f"loss_{name}"], rel=1e-6)
