"""What a chart can stand over besides steps, and the steps that it marks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from channel_metrics.analysis.readers.keys import GLOBAL

if TYPE_CHECKING:
    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.store import Steps, Values

__all__ = ["AXES", "axes_of", "marks_of"]

AXES = ("all_tokens", "epoch", "time")

_MAX_POINTS = 300
_MAX_MARKS = 200
# Seconds since the run began, or since 1970, in the order in which they are looked for.
_CLOCKS = ("_runtime", "elapsed_time", "runtime", "time", "_timestamp", "timestamp")


def axes_of(run: Run) -> dict[str, tuple[Steps, Values]]:
    """For each of `AXES` that the log has: steps, and the value that each has on the axis.

    Values never fall, so that a resumed run has one place for each step.
    """
    found = {
        "all_tokens": _all_tokens(run),
        "epoch": run.series(GLOBAL, "epoch"),
        "time": _time(run),
    }
    return {name: _thinned(*series) for name, series in found.items() if len(series[0]) > 1}


def marks_of(run: Run) -> list[dict[str, Any]]:
    """The steps to mark, as `{kind, step, text}`: `resume`, `alert` or `evaluation`."""
    resumed = [("resume", int(step), "resumed") for step in run.resumes]
    alerts = {("alert", one.step, f"{one.channel} {one.kind}".strip()) for one in run.alerts}
    evaluated: set[int] = set()
    for key, steps, values in run.all_series():
        if "alert" in key.metric.split("/")[0].split("_"):
            about = f"{key.channel} " if key.channel else ""
            alerts |= {("alert", int(s), f"{about}{key.metric}") for s in steps[values != 0]}
        elif key.split != "train":
            evaluated |= set(steps.tolist())
    marks = [*resumed, *sorted(alerts, key=lambda mark: mark[1])]
    marks += [("evaluation", step, "evaluation") for step in sorted(evaluated)]
    return [{"kind": kind, "step": step, "text": text} for kind, step, text in marks[:_MAX_MARKS]]


def _all_tokens(run: Run) -> tuple[Steps, Values]:
    """The tokens of all channels up to each step."""
    from channel_metrics.analysis.report.curves import own_tokens

    names = run.channels("train")
    logged = [
        run.series(name, metric)[0] for name in names for metric in ("tokens_total", "tokens")
    ]
    steps = np.unique(np.concatenate([np.empty(0, np.int64), *logged]))
    whole = np.zeros(len(steps))
    for name in names:
        tokens = own_tokens(run, name, steps)
        if tokens is not None:
            whole += tokens
    return steps, whole


def _time(run: Run) -> tuple[Steps, Values]:
    """Seconds since the first value of the run's clock."""
    for name in _CLOCKS:
        steps, values = run.series(GLOBAL, name)
        if len(steps) > 1:
            return steps, values - values[0]
    return run.series(GLOBAL, _CLOCKS[0])


def _thinned(steps: Steps, values: Values) -> tuple[Steps, Values]:
    usable = np.isfinite(values)
    steps, values = steps[usable], np.maximum.accumulate(values[usable])
    places = np.unique(
        np.linspace(0, len(steps) - 1, min(len(steps), _MAX_POINTS)).astype(np.int64)
    )
    return steps[places], values[places]
