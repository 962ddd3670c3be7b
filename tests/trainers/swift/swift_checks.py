"""What holds for every run of ms-swift with channel metrics, beside one without."""

from __future__ import annotations

from typing import Any

import pytest
from swift_files import CHANNELS

Log = list[dict[str, float]]
OWN = ("loss_", "eval_loss_")


def check_training(off: dict[str, Any], on: dict[str, Any]) -> None:
    """Weights, random numbers and all that ms-swift logs are those of ms-swift alone."""
    assert (on["weights"], on["random"]) == (off["weights"], off["random"])
    assert len(on["log"]) == len(off["log"])
    for theirs, ours in zip(off["log"], on["log"], strict=True):
        for key, value in theirs.items():
            if key.startswith(OWN):
                assert ours[key] == pytest.approx(value, rel=1e-6), key
            else:
                assert ours[key] == value, key


def windows(log: Log) -> Log:
    found = [entry for entry in log if "loss" in entry]
    assert len(found) >= 2
    return found


def channels_in(entry: dict[str, float]) -> list[str]:
    names = (*CHANNELS, "unlabeled")
    return [name for name in names if f"{name}_loss" in entry]


def check_sums(log: Log, prefix: str = "") -> None:
    """Shares add up to one; the accuracies to the one that ms-swift logs."""
    for entry in log:
        names = [n for n in (*CHANNELS, "unlabeled") if f"{prefix}{n}_loss" in entry]
        shares = {name: entry[f"{prefix}{name}_share"] for name in names}
        assert sum(shares.values()) == pytest.approx(1)
        accuracy = sum(entry[f"{prefix}{name}_token_acc"] * shares[name] for name in names)
        # What it counts in float32 divides in float64.
        assert accuracy == pytest.approx(entry[f"{prefix}token_acc"], abs=1e-6)


def check_raw(log: Log, theirs: Log, windows_compared: int | None = None) -> None:
    """`{channel}_loss` is what ms-swift logs as `loss_{channel}` where it weights no tokens."""
    pairs = list(zip(windows(log), windows(theirs), strict=True))[:windows_compared]
    for ours, own in pairs:
        names = [key.removeprefix("loss_") for key in own if key.startswith("loss_")]
        assert sorted(names) == sorted(channels_in(ours)) and len(names) > 1
        for name in names:
            assert ours[f"{name}_loss"] == pytest.approx(own[f"loss_{name}"], rel=2e-6)
