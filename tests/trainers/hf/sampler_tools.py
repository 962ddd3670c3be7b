"""Sources of a `MixedStream`, weights that change at each window, and what came of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from hf_tools import make_records

from channel_metrics import MetricsConfig, MixedStream

NAMES = ("bbu", "rru")
SAMPLER: dict[str, Any] = {"start": {"bbu": 1, "rru": 1}, "rule": "sampler_tools:by_step"}
CONFIG = MetricsConfig(channels=NAMES, metrics=("loss", "samples"), sampler=SAMPLER)


def by_step(window: Any, weights: dict[str, float]) -> dict[str, float]:
    """Far from the weights at first, and another one after each window."""
    return {"bbu": 1.0, "rru": 4.0 + window.step + weights["rru"]}


def sources(make: Callable[..., Any] = make_records) -> dict[str, Any]:
    return {name: make(20, seed=i, channels=(name,)) for i, name in enumerate(NAMES)}


def values(logs: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """What the windows logged of the mixture."""
    ends = ("_weight", "_samples", "_loss")
    found = [
        {k: v for k, v in entry.items() if k.startswith(NAMES) and k.endswith(ends)}
        for entry in logs
    ]
    return [entry for entry in found if entry]


def weights(found: Iterable[dict[str, float]]) -> list[float]:
    return [log["rru_weight"] for log in found]


def check_draws(found: list[dict[str, float]], per_step: int, lag: int) -> None:
    """The samples of each window are those that its weights and the seed give.

    per_step: the records of a window, over all ranks.
    """
    stream = MixedStream(sources(), batch_size=per_step)
    entries, held = [(0, [0.5, 0.5])], 0.5
    for step in range(1, len(found)):
        rru = (4 + step + held) / (5 + step + held)
        entries.append((step * per_step + lag, [1 - rru, rru]))
        held = rru
    stream.plan.begin(entries, 0, [0, 0])
    drawn = iter(stream)
    for log in found:
        names = [record["channel"] for record in islice(drawn, per_step)]
        assert {n: names.count(n) for n in NAMES} == {n: log.get(f"{n}_samples", 0) for n in NAMES}
    assert held > 0.9 and lag < (len(found) - 1) * per_step, "the weights have changed"
