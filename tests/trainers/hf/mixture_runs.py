"""What tests of LLaMA-Factory and Axolotl share: runs that have ended, and what they must log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "AXES",
    "NAMES",
    "WHOLE",
    "Expected",
    "Logged",
    "check",
    "check_axes",
    "check_split",
    "means",
    "same",
]

NAMES = ("code", "chat")
# A learning rate of 0, no dropout, all records once, one log: the sums of a whole dataset.
WHOLE: dict[str, Any] = {"learning_rate": 0.0, "num_train_epochs": 1, "logging_steps": 1000}
# Labels from a column of the records, and from their channel.
AXES = {"region": "source", "kind": {"code": "program", "chat": "talk"}}

# {channel: (loss, tokens, samples)}
Expected = dict[str, tuple[float, int, int]]


@dataclass
class Logged:
    """A run in `folder`."""

    folder: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        """What the trainer logged."""
        raise NotImplementedError

    @property
    def values(self) -> dict[str, Any]:
        """All that was logged in training, by key."""
        trained = [e for e in self.log if not any(key.startswith("eval_") for key in e)]
        return {key: value for entry in trained for key, value in entry.items()}

    @property
    def evaluation(self) -> dict[str, Any]:
        """The first evaluation."""
        return next(entry for entry in self.log if "eval_loss" in entry)

    @property
    def weights(self) -> bytes:
        """The trained weights."""
        (path,) = (self.folder / "out").glob("*model.safetensors")
        return path.read_bytes()


def means(samples: Iterable[tuple[str, float, int, int]]) -> Expected:
    """samples: (channel, nll, tokens, how many samples these are)."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0])
    for name, *values in samples:
        sums[name] = [old + new for old, new in zip(sums[name], values, strict=True)]
    return {name: (nll / n, int(n), int(samples)) for name, (nll, n, samples) in sums.items()}


def check(found: Mapping[str, Any], wanted: Expected, prefix: str = "") -> None:
    """The same channels, and their values. Labels of axes are left out."""
    own = [key.removeprefix(prefix) for key in found if key.startswith(prefix)]
    ours = {key.removesuffix("_tokens") for key in own if key.endswith("_tokens")}
    assert {name for name in ours if "/" not in name} == set(wanted)
    for name, (loss, tokens, samples) in wanted.items():
        assert found[f"{prefix}{name}_tokens"] == tokens, name
        assert found[f"{prefix}{name}_samples"] == samples, name
        assert found[f"{prefix}{name}_loss"] == pytest.approx(loss, rel=1e-6), name


def check_axes(found: Mapping[str, Any], by_channel: Expected, by_source: Expected) -> None:
    """The channels of a run with `AXES`, and the labels of both axes."""
    kinds: Any = AXES["kind"]
    check(found, by_channel)
    check(found, by_source, "region/")
    check(found, {kinds[name]: value for name, value in by_channel.items()}, "kind/")


def same(on: Logged, off: Logged) -> None:
    """The same weights, and the same values of the trainer."""
    assert on.weights == off.weights
    keys = ("loss", "grad_norm", "eval_loss", "learning_rate")
    logged = [[{k: e[k] for k in keys if k in e} for e in run.log] for run in (on, off)]
    assert logged[0] == logged[1] and len(logged[0]) > 4


def check_split(run: Logged, samples: int) -> None:
    """A validation set that was split from the records of all channels."""
    found = run.evaluation
    assert sum(found[f"eval_{name}_samples"] for name in NAMES) == samples
    assert min(found[f"eval_{name}_tokens"] for name in NAMES) > 0
    assert min(found[f"eval_{name}_loss"] for name in NAMES) > 0
