"""Forgetting and overfitting, window by window: what is compared with what, and what is kept."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from session_tools import new

from channel_metrics import MicroBatch
from channel_metrics.observers.loss_alerts import LOSS_KINDS, forget_loss, loss_reasons, new_losses
from channel_metrics.observers.rises import group_rate
from channel_metrics.observers.window_alerts import Reason

SESSION = new()
RATE = 0.02


def look(
    state: dict[str, Any], split: str, counts: dict[str, float] | None = None, **losses: float
) -> list[Reason]:
    """A window, by default with two tokens of each channel; all that is found is told."""
    counts = counts or dict.fromkeys(losses, 2.0)
    sums = {
        n: {"nll": counts[n] * loss, "tokens": counts[n], "nonfinite": 0.0}
        for n, loss in losses.items()
    }
    found = [*loss_reasons(split, sums, SESSION, kinds=LOSS_KINDS, rate=RATE, state=state)]
    for one in found:
        forget_loss(state, split, one.channel)
    return found


def found(own_training: Callable[[int], float]) -> list[tuple[str, str]]:
    """The reasons of evaluations of `a`, whose loss rises after 40 windows. Of two channels that
    are trained on, `b` falls by more than `a` can rise."""
    state, reasons = new_losses(), list[Reason]()
    for step in range(80):
        noise = random.Random(step).gauss
        reasons += look(state, "train", a=own_training(step), b=9 - 0.1 * step)
        loss = 2 + noise(0, 0.01) + (0.3 if step > 40 else 0)
        reasons += look(state, "eval", a=loss, c=2 + 0.002 * step)
    return [(one.kind, one.channel) for one in reasons if one.channel == "a"]


def test_an_evaluation_is_compared_with_training_on_the_same_channel() -> None:
    assert found(lambda step: 4 - 0.01 * step) == [("overfitting", "a")], "once"
    assert found(lambda step: 2 + 0.0001 * step) == []


def test_training_since_the_evaluation_before() -> None:
    state = new_losses()
    look(state, "train", a=1.0)
    look(state, "eval", a=1.0)
    look(state, "eval_2", a=1.0)
    assert state["trained"]["a"] == [2.0, 2.0], "both evaluations see it"
    look(state, "train", a=3.0)
    look(state, "train", a=4.0)
    assert state["trained"] == {"a": [14.0, 4.0]}


def test_a_channel_without_training_is_compared_with_all_of_it() -> None:
    """`c` is only evaluated; what its loss is held against falls or rises with that of `a`."""
    for slope, wanted in ((-0.01, [("overfitting", "c")]), (0.01, [])):
        state, reasons = new_losses(), list[Reason]()
        for step in range(80):
            noise = random.Random(step).gauss
            reasons += look(state, "train", a=4 + slope * step)
            reasons += look(state, "eval", c=2 + noise(0, 0.01) + (0.3 if step > 40 else 0))
        # The whole evaluation is that of `c` here.
        assert [(one.kind, one.channel) for one in reasons if one.channel] == wanted


def test_a_channel_that_leaves_training_is_not_compared_with_the_others() -> None:
    """No loss of training falls: `a` ends, and then there is only `b`, whose loss is lower."""
    state, reasons = new_losses(), list[Reason]()
    for step in range(80):
        noise = random.Random(step).gauss
        trained = {"a": 4.0} if step < 40 else {"b": 1.0}
        reasons += look(state, "train", None, **trained)
        rise = 0.3 if step > 40 else 0
        reasons += look(state, "eval", a=2 + noise(0, 0.01) + rise, c=2 + noise(0, 0.01))
    assert reasons == []


@pytest.mark.parametrize("fall", [0.0, 0.2])
def test_a_change_of_the_mix_is_no_fall(fall: float) -> None:
    """`c` gets rarer, and so the mean over all tokens falls, in training as in the evaluation."""
    state, reasons = new_losses(), list[Reason]()
    for step in range(80):
        noise = random.Random(step).gauss
        is_late = step >= 40
        counts = {"a": 8.0, "b": 2.0, "c": 1.0 if is_late else 6.0}
        a, b = 2 + noise(0, 0.01) + 0.3 * is_late, 1 - fall * is_late
        trained = {"b": b, "c": 5.0} if step % 3 else {"b": b}
        reasons += look(state, "train", counts, a=a, **trained)
        reasons += look(state, "eval", {**counts, "b": 8.0}, a=a, b=b, c=5.0)
    told = [(one.kind, one.channel, one.text.rpartition("by ")[2]) for one in reasons]
    # `b`, one of two others, fell by 0.2 in half of the four windows.
    assert told == ([("forgetting", "a", "0.0500")] * 2 if fall else []), reasons


def test_a_mix_of_an_evaluation_is_no_rise_of_the_whole() -> None:
    """Only the number of its tokens changes, and then a channel joins; training falls."""
    state, reasons = new_losses(), list[Reason]()
    for step in range(120):
        noise = random.Random(step).gauss
        look(state, "train", b=4 - 0.01 * step)
        counts = {"a": 8.0, "c": 1.0 if step < 40 else 40.0, "late": 9.0}
        late = {"late": 9.0 + noise(0, 0.01)} if step >= 80 else {}
        losses = {"a": 2 + noise(0, 0.01), "c": 5 + noise(0, 0.01), **late}
        reasons += look(state, "eval", counts, **losses)
        if step % 7 == 0:
            reasons += look(state, "eval", counts, c=losses["c"])  # a part of the channels
    assert reasons == []
    for step in range(120, 160):
        noise = random.Random(step).gauss
        look(state, "train", b=4 - 0.01 * step)
        losses = {name: loss + noise(0, 0.01) for name, loss in (("a", 2), ("c", 6), ("late", 9))}
        reasons += look(state, "eval", counts, **losses)
    assert [(one.kind, one.channel) for one in reasons] == [
        ("overfitting", "c"),
        ("overfitting", ""),
    ]
    assert "windows and of all channels, each counted alike, while" in reasons[1].text


def test_later_channels_have_a_smaller_part_of_the_rate() -> None:
    state = new_losses()
    look(state, "train", a=1.0, b=1.0, unlabeled=1.0)
    look(state, "train", a=1.0, late=1.0)
    rates = {name: of["rate"] for name, of in state["tests"]["train"].items()}
    first, second = group_rate(RATE, 1, 2), group_rate(RATE, 2, 1)
    assert rates == {"a": first, "b": first, "late": second}, "nothing is asked of unlabeled tokens"
    assert first == pytest.approx(RATE / 4) and second == pytest.approx(RATE / 6)


@pytest.mark.parametrize("gap", [30, 60, 100, 160])
@pytest.mark.parametrize("cooldown", [1, 50, 100, 150])
def test_a_rise_during_the_cooldown_is_told_after_it(
    tmp_path: Path, cooldown: int, gap: int
) -> None:
    alerts = {"file": str(tmp_path / "alerts.jsonl"), "cooldown": cooldown, "kinds": ["forgetting"]}
    settings: dict[str, Any] = {"alerts": alerts, "live_table": False}
    metrics, noise = new("a", "b", **settings), random.Random(0).gauss
    for step in range(1, 300):
        level = 2.0 if step < 100 else 2.5 if step < 100 + gap else 3.5
        losses = [[level + noise(0, 0.01)] * 8, [3 - 0.002 * step + noise(0, 0.01)] * 8]
        metrics.count(MicroBatch(token_losses=torch.tensor(losses), channels=["a", "b"]))
        metrics.close(step)
        if step == 150:  # a rise that waits is in the checkpoint
            metrics.save(tmp_path, is_writer=True)
            metrics = new("a", "b", **settings)
            metrics.start(tmp_path)
    lines = (tmp_path / "alerts.jsonl").read_text().splitlines()
    first, then = [json.loads(line) for line in lines]
    found = int(then["text"].partition("; found at step ")[2] or then["step"])
    assert first["step"] in range(100, 120) and found in range(100 + gap, 140 + gap)
    assert then["step"] == max(first["step"] + cooldown, found)
