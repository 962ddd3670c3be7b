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


def look(state: dict[str, Any], split: str, **losses: float) -> list[Reason]:
    """A window with two tokens of each channel; all that is found is told."""
    sums = {n: {"nll": 2 * loss, "tokens": 2.0, "nonfinite": 0.0} for n, loss in losses.items()}
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
    assert state["trained"] == {"a": [14.0, 4.0], "": [14.0, 4.0]}


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


def test_later_channels_have_a_smaller_part_of_the_rate() -> None:
    state = new_losses()
    look(state, "train", a=1.0, b=1.0, unlabeled=1.0)
    look(state, "train", a=1.0, late=1.0)
    rates = {name: of["rate"] for name, of in state["tests"]["train"].items()}
    first, second = group_rate(RATE, 1, 2), group_rate(RATE, 2, 1)
    assert rates == {"a": first, "b": first, "late": second}, "nothing is asked of unlabeled tokens"
    assert first == pytest.approx(RATE / 4) and second == pytest.approx(RATE / 6)


@pytest.mark.parametrize(("cooldown", "second"), [(1, range(201, 220)), (150, range(254, 280))])
def test_a_rise_during_the_cooldown_is_told_after_it(
    tmp_path: Path, cooldown: int, second: range
) -> None:
    alerts = {"file": str(tmp_path / "alerts.jsonl"), "cooldown": cooldown, "kinds": ["forgetting"]}
    metrics, noise = new("a", "b", alerts=alerts), random.Random(0).gauss
    for step in range(1, 400):
        level = 2.0 if step < 100 else 2.5 if step < 200 else 3.5
        losses = [[level + noise(0, 0.01)] * 8, [3 - 0.002 * step + noise(0, 0.01)] * 8]
        metrics.count(MicroBatch(token_losses=torch.tensor(losses), channels=["a", "b"]))
        metrics.close(step)
    lines = (tmp_path / "alerts.jsonl").read_text().splitlines()
    first, then = [json.loads(line)["step"] for line in lines]
    assert first in range(101, 120) and then in second
