"""The two axes that each case has besides its channels, and what a window holds on them.

One follows from the channel. The other one is a field of the records; a trainer whose data have
no fields gets it in the joint names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from reference import slope

from channel_metrics import Window
from channel_metrics.core.names import MARK, joint_name
from contract.script import (
    Harness,
    OneSequence,
    Ran,
    Script,
    check_values,
    expected,
    measure,
    train_windows,
    unit,
    window_sequences,
)

__all__ = [
    "AXES",
    "KINDS",
    "by",
    "check_slopes",
    "check_tree",
    "check_window",
    "check_windows",
    "labels_of_record",
    "name_of",
]

KINDS = {"a": "x", "b": "x", "c": "y", "g/a": "x", "g/b": "x"}
AXES: dict[str, Any] = {"kind": KINDS, "lang": "lang"}


def labels_of_record(sequence: OneSequence) -> dict[str, str | None]:
    """The fields of its record."""
    return {"channel": sequence.channel, "lang": language_of(sequence)}


def name_of(sequence: OneSequence) -> str | None:
    """Its joint name, which a case may have given as its channel."""
    channel, language = sequence.channel, language_of(sequence)
    if language is None or (channel and MARK in channel):
        return channel
    return joint_name(channel, [("lang", language)])


def language_of(sequence: OneSequence) -> str | None:
    return ("en", None, "de", None)[sequence.number % 4]


def kind_of(sequence: OneSequence) -> str | None:
    return KINDS.get(sequence.channel or "")


def check_windows(harness: Harness, found: Ran, script: Script) -> None:
    """The train windows of a run that nothing disturbs, on all axes."""
    windows = [window for window in found.windows if window.split == "train"]
    for window, sequences in zip(windows, window_sequences(script), strict=True):
        check_window(harness, window, sequences)


def check_window(harness: Harness, window: Window, sequences: Sequence[OneSequence]) -> None:
    """One window, on all axes."""
    check_values(window.values, expected(harness, sequences))
    check_values(window.axes["kind"], by(harness, sequences, kind_of))
    check_values(window.axes["lang"], by(harness, sequences, language_of))


def check_tree(harness: Harness, window: Window, sequences: Sequence[OneSequence]) -> None:
    """The group `g`: over all its tokens, and the mean of its channels."""
    of_group = by(harness, sequences, lambda one: "g" if "/" in (one.channel or "") else None)
    check_values(window.axes["tree"], {"g": of_group["g"]})
    if measure(harness) != "loss":
        assert "tree_mean" not in window.axes
        return
    channels = expected(harness, sequences)
    losses = [values["loss"] for name, values in channels.items() if "/" in name]
    means = window.axes["tree_mean"]
    assert means == {"g": {"loss": pytest.approx(sum(losses) / len(losses), rel=1e-5)}}


def check_slopes(harness: Harness, found: Ran, script: Script) -> None:
    """The slopes of the last train window: of the channels that have tokens in three of them."""
    points: dict[str, list[tuple[int, float]]] = {}
    for sequences in window_sequences(script):
        for name, values in expected(harness, sequences).items():
            if unit(harness) == "tokens":
                points.setdefault(name, []).append((int(values["tokens"]), values["loss"]))
    wanted = {name: 1e6 * line[0] for name, of in points.items() if (line := slope(of))}
    last = train_windows(found)[-1]
    slopes = {name: of["loss_slope"] for name, of in last.items() if "loss_slope" in of}
    assert slopes == pytest.approx(wanted, rel=1e-3)
    assert bool(wanted) == (unit(harness) == "tokens")


def by(
    harness: Harness, sequences: Sequence[OneSequence], label: Callable[[OneSequence], str | None]
) -> dict[str, dict[str, float]]:
    """What a window holds per label, by counting one sequence after the other."""
    return expected(harness, [replace(one, channel=label(one)) for one in sequences])
