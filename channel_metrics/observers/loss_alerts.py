"""Forgetting and overfitting: a loss has risen while another one has fallen.

Whether it has risen says one sequential test, see `rises`. A rise is forgetting if the loss of the
other channels has fallen in the meantime, and overfitting if it is one of an evaluation, and the
loss of training has fallen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from channel_metrics.core.schema import Schema
from channel_metrics.observers.rises import Block, Rise, add, forget, group_rate, merged, new_state
from channel_metrics.observers.window_alerts import Judged
from channel_metrics.windows import Window

__all__ = ["Session", "losses_judged", "new_losses"]

_WHOLE = ""
_BOTH = ("forgetting", "overfitting")


class Session(Protocol):
    """What is asked of a `ChannelMetrics`."""

    schema: Schema

    def warn_once(self, message: str, *values: object) -> None:
        """Warn."""


def new_losses() -> dict[str, Any]:
    """What is remembered of losses, as plain values."""
    return {"groups": 0, "tests": {}, "trained": {}, "evaluated": False}


def losses_judged(
    window: Window,
    session: Session,
    *,
    kinds: Collection[str],
    rate: float,
    state: dict[str, Any],
) -> Iterator[Judged]:
    """Test the losses of a window.

    Args:
        window: of training or of an evaluation.
        session: its schema has the loss.
        kinds: those that are watched for.
        rate: of false alerts in the whole run.
        state: of `new_losses`, which is changed.
    """
    if not set(_BOTH).intersection(kinds):
        return
    losses = _losses(window, session)
    if not losses:
        return
    whole = merged(list(losses.values()))
    is_training = window.split == "train"
    trained = _trained(state, {**losses, _WHOLE: whole}, is_training)
    if not is_training and "overfitting" in kinds:
        losses = {**losses, _WHOLE: whole}
    tests = state["tests"].setdefault(window.split, {})
    new = [name for name in losses if name not in tests]
    if new:
        state["groups"] += 1
        each = group_rate(rate, state["groups"], len(new))
        tests.update({name: new_state(each) for name in new})
    for name, block in losses.items():
        others = None if name == _WHOLE else _without(whole, block)
        rise = add(tests[name], [*block, others, trained.get(name)])
        kind = _kind(rise, kinds)
        if rise is not None and kind:
            forget(tests[name])
            yield Judged(kind, name, True, _text(rise, kind), lasts=False)


def _losses(window: Window, session: Session) -> dict[str, Block]:
    """{channel: [loss, its weight]} of the channels that have a loss."""
    loss = session.schema.metric("loss")
    if loss is None:
        session.warn_once(
            f"alerts of forgetting and overfitting need a loss, which {session.schema.unit} do "
            "not have here; there are none."
        )
        return {}
    found = {}
    for name in window.names[: window.num_channels]:
        sums = window.sums(name)
        count = sums[session.schema.count]
        value = loss.formula(sums) if count else None
        if value is not None and math.isfinite(value):
            found[name] = [value, count]
    return found


def _trained(
    state: dict[str, Any], losses: dict[str, Block], is_training: bool
) -> dict[str, float | None]:
    """For evaluations: {name: loss of training since the evaluations before}."""
    trained = state["trained"]
    if not is_training:
        state["evaluated"] = True
        of_all = trained.get(_WHOLE, [None])[0]
        return {name: trained.get(name, [of_all])[0] for name in losses}
    if state["evaluated"]:
        trained.clear()
        state["evaluated"] = False
    for name, block in losses.items():
        trained[name] = merged([trained[name], block]) if name in trained else block
    return {}


def _without(whole: Block, one: Block) -> float | None:
    """The loss of all channels but one; None if it is the only one."""
    weight = whole[1] - one[1]
    return (whole[0] * whole[1] - one[0] * one[1]) / weight if weight else None


def _kind(rise: Rise | None, kinds: Collection[str]) -> str:
    if rise is None:
        return ""
    others, trained = rise.partners
    if "overfitting" in kinds and trained is not None and trained < 0:
        return "overfitting"
    return "forgetting" if "forgetting" in kinds and others is not None and others < 0 else ""


def _text(rise: Rise, kind: str) -> str:
    other = rise.partners[0 if kind == "forgetting" else 1] or 0.0
    fell = "that of the other channels" if kind == "forgetting" else "that of training"
    return (
        f"the loss rose from {rise.before:.4f} to {rise.now:.4f}, the mean of {rise.windows} "
        f"windows, while {fell} fell by {-other:.4f}"
    )
