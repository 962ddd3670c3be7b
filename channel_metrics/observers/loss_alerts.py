"""Forgetting and overfitting: a loss has risen while another one has fallen.

Whether it has risen says one sequential test, see `rises`. A rise is forgetting if the loss of the
other channels has fallen in the meantime, and overfitting if it is one of an evaluation, and the
loss of training has fallen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.schema import Schema
from channel_metrics.observers.rises import Rise, add, forget, group_rate, new_state
from channel_metrics.observers.window_alerts import Reason

__all__ = ["LOSS_KINDS", "Session", "forget_loss", "loss_reasons", "new_losses"]

LOSS_KINDS = ("forgetting", "overfitting")

_WHOLE = ""

# [sum of the losses of tokens, their number]
Sum = list[float]


class Session(Protocol):
    """What is asked of a `ChannelMetrics`."""

    schema: Schema

    def warn_once(self, message: str, *values: object) -> None:
        """Warn."""


def new_losses() -> dict[str, Any]:
    """What is remembered of losses, as plain values."""
    return {"groups": 0, "tests": {}, "trained": {}, "evaluated": False}


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
    whole = [math.fsum(part) for part in zip(*losses.values(), strict=True)]
    is_training = split == "train"
    if is_training and "overfitting" in kinds:
        _train(state, {**losses, _WHOLE: whole})
    state["evaluated"] |= not is_training
    tested = losses if is_training or "overfitting" not in kinds else {**losses, _WHOLE: whole}
    tests = state["tests"].setdefault(split, {})
    new = [name for name in tested if name not in tests]
    if new:
        state["groups"] += 1
        each = group_rate(rate, state["groups"], len(new))
        tests.update({name: new_state(each) for name in new})
    trained = state["trained"]
    for name, (total, count) in tested.items():
        partners = [_mean(whole[0] - total, whole[1] - count)]
        if not is_training:
            partners.append(_mean(*trained.get(name, trained.get(_WHOLE, (0.0, 0.0)))))
        rise = add(tests[name], [total / count, count, *partners])
        if rise is not None and (kind := _kind(rise, kinds)):
            yield Reason(kind, name, _text(rise, kind))


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


def _train(state: dict[str, Any], losses: Mapping[str, Sum]) -> None:
    """Add a window to what was trained on since the evaluations before."""
    if state["evaluated"]:
        state.update(trained={}, evaluated=False)
    trained = state["trained"]
    for name, (total, count) in losses.items():
        before = trained.get(name, (0.0, 0.0))
        trained[name] = [before[0] + total, before[1] + count]


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _kind(rise: Rise, kinds: Collection[str]) -> str:
    changes = dict(zip(LOSS_KINDS, rise.partners, strict=False))
    fell = [kind for kind, change in changes.items() if change is not None and change < 0]
    return next((kind for kind in reversed(fell) if kind in kinds), "")


def _text(rise: Rise, kind: str) -> str:
    change = rise.partners[LOSS_KINDS.index(kind)] or 0.0
    fell = "that of the other channels" if kind == "forgetting" else "that of training"
    return (
        f"the loss rose from {rise.before:.4f} to {rise.now:.4f}, the mean of {rise.windows} "
        f"windows, while {fell} fell by {-change:.4f}"
    )
