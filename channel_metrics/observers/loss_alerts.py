"""Forgetting and overfitting: a loss has risen while another one has fallen.

Whether it has risen says one sequential test, see `rises`. A rise is forgetting if the losses of
the other channels have fallen in the meantime, and overfitting if it is one of an evaluation, and
the loss of training has fallen.

A mean over the tokens of several channels also moves if only their mix does. So several channels
are followed by their moves: how much the loss of each has changed, on average over the channels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.schema import Schema
from channel_metrics.observers.rises import Rise, add, forget, group_rate, new_state, short
from channel_metrics.observers.window_alerts import Reason

__all__ = ["LOSS_KINDS", "Session", "forget_loss", "loss_reasons", "new_losses"]

LOSS_KINDS = ("forgetting", "overfitting")

_WHOLE = ""

# [sum of the losses of tokens, their number]
Sum = list[float]
# {"last": {channel: its last loss}, "moved": {channel, or the whole: see `_follow`}}
Moves = dict[str, dict[str, float]]


class Session(Protocol):
    """What is asked of a `ChannelMetrics`."""

    schema: Schema

    def warn_once(self, message: str, *values: object) -> None:
        """Warn."""


def new_losses() -> dict[str, Any]:
    """What is remembered of losses, as plain values."""
    return {
        "groups": 0,
        "tests": {},
        "moves": {},
        "trained": {},
        "moves of training": _no_moves(),
        "evaluated": False,
    }


def loss_reasons(
    split: str,
    sums: Mapping[str, Mapping[str, float]],
    session: Session,
    *,
    kinds: Collection[str],
    rate: float,
    state: dict[str, Any],
) -> Iterator[Reason]:
    """Test the losses of a window.

    Args:
        split: of the window.
        sums: {channel: {column: sum}} of the window.
        session: its schema has the loss.
        kinds: those that are watched for.
        rate: of false alerts in the whole run.
        state: of `new_losses`, which is changed.
    """
    losses = _losses(sums, session)
    if not losses:
        return
    if split == "train" and "overfitting" in kinds:
        _train(state, losses)
    elif split != "train":
        _evaluate(state)
    tests = state["tests"].setdefault(split, {})
    new = [name for name in losses if name not in tests]
    moves = state["moves"].setdefault(split, _no_moves())
    _follow(moves, {name: total / count for name, (total, count) in losses.items()})
    if split != "train" and "overfitting" in kinds:
        if _WHOLE not in tests:
            new.append(_WHOLE)
        elif new:
            forget(tests[_WHOLE])
        if len(losses) == len(moves["last"]):
            losses[_WHOLE] = _whole(losses)
    if new:
        state["groups"] += 1
        each = group_rate(rate, state["groups"], len(new))
        tests.update({name: new_state(each) for name in new})
    for name, (total, count) in losses.items():
        others = None if name == _WHOLE else moves["moved"].get(name)
        training = [] if split == "train" else _training(state, name)
        rise = add(tests[name], [total / count, count, others, *training])
        if rise is not None and (kind := _kind(rise, kinds)):
            yield Reason(kind, name, _text(rise, kind, name))


def forget_loss(state: dict[str, Any], split: str, name: str) -> None:
    """Begin anew with a loss whose rise was told. Until then, the rise is found again."""
    forget(state["tests"][split][name])


def _losses(sums: Mapping[str, Mapping[str, float]], session: Session) -> dict[str, Sum]:
    """The sums of the channels that have a loss."""
    loss, count = session.schema.metric("loss"), session.schema.count
    if loss is None:
        session.warn_once(
            f"alerts of forgetting and overfitting need a loss, which {session.schema.unit} do "
            "not have here; there are none."
        )
        return {}
    values = {
        name: (loss.formula(of), of[count])
        for name, of in sums.items()
        if of[count] and name != UNLABELED
    }
    return {
        name: [value * size, size]
        for name, (value, size) in values.items()
        if value is not None and math.isfinite(value)
    }


def _whole(losses: Mapping[str, Sum]) -> Sum:
    """The mean of the losses of all channels, each counted alike, as a sum."""
    size = math.fsum(count for _, count in losses.values())
    mean = math.fsum(total / count for total, count in losses.values()) / len(losses)
    return [mean * size, size]


def _train(state: dict[str, Any], losses: Mapping[str, Sum]) -> None:
    """Add a window to what was trained on since the evaluations before."""
    if state["evaluated"]:
        state.update(trained={}, evaluated=False)
    trained = state["trained"]
    for name, (total, count) in losses.items():
        before = trained.get(name, (0.0, 0.0))
        trained[name] = [before[0] + total, before[1] + count]


def _evaluate(state: dict[str, Any]) -> None:
    """Follow the training since the evaluations before, at the first one after it."""
    if not state["evaluated"]:
        of_training = {name: total / count for name, (total, count) in state["trained"].items()}
        _follow(state["moves of training"], of_training)
    state["evaluated"] = True


def _training(state: dict[str, Any], name: str) -> list[float | None]:
    """The loss of training on a channel since the evaluation before, and the moves of all training.

    The one or the other is None: a channel that was ever trained on is compared with itself only.
    """
    moves = state["moves of training"]
    if name not in moves["last"]:
        return [None, moves["moved"].get(_WHOLE)]
    total, count = state["trained"].get(name, (0.0, 0.0))
    return [total / count if count else None, None]


def _no_moves() -> Moves:
    return {"last": {}, "moved": {}}


def _follow(moves: Moves, losses: Mapping[str, float]) -> None:
    """Add up how much the losses have changed: for each channel the mean change of the others, for
    the whole that of all. An absent channel keeps its loss, and a new one has not changed."""
    last, moved = moves["last"], moves["moved"]
    losses = {name: short(loss) for name, loss in losses.items()}
    changes = {name: loss - last.get(name, loss) for name, loss in losses.items()}
    last.update(losses)
    total = math.fsum(changes.values())
    for name in [*last, _WHOLE]:
        size = len(last) - (name != _WHOLE)
        if size:
            change = (total - changes.get(name, 0.0)) / size
            moved[name] = short(moved.get(name, 0.0) + change)


def _kind(rise: Rise, kinds: Collection[str]) -> str:
    return next((one for one in reversed(LOSS_KINDS) if one in kinds and _fall(rise, one) > 0), "")


def _fall(rise: Rise, kind: str) -> float:
    """How much that has fallen which the loss is compared with; 0 if it has not."""
    others, *training = rise.partners
    changes = [others] if kind == "forgetting" else training
    return max((-change for change in changes if change is not None), default=0.0)


def _text(rise: Rise, kind: str, name: str) -> str:
    fell = "that of the other channels" if kind == "forgetting" else "that of training"
    of = "" if name else " and of all channels, each counted alike"
    return (
        f"the loss rose from {rise.before:.4f} to {rise.now:.4f}, the mean of {rise.windows} "
        f"windows{of}, while {fell} fell by {_fall(rise, kind):.4f}"
    )
