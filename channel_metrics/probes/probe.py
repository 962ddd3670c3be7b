"""Probes: a few samples per dataset, measured every so many steps. The parts without a framework.

>>> choose(1000, 3, seed=0, name="canary")
[210, 782, 830]
>>> deal(5, num_forwards=1, num_ranks=2, rank=1)
[range(3, 5)]
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from channel_metrics.config import refuse_unknown_keys
from channel_metrics.core.faults import OnError
from channel_metrics.core.intervals import MOMENTS
from channel_metrics.core.keys import sanitize
from channel_metrics.errors import ConfigError

__all__ = ["PROBE_COLUMNS", "ProbeBudget", "ProbeConfig", "choose", "deal", "probe_keys"]

_METRICS = ("loss", "token_acc")
# What is summed up per dataset: the moments of the losses, then of the correct tokens.
PROBE_COLUMNS = tuple(f"{part}_{moment}" for part in ("loss", "correct") for moment in MOMENTS)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How often probes run, on how much, and what they may cost."""

    every: int = 100
    """Optimizer steps between two probes, as long as the budget allows it."""

    batches: int = 4
    """Batches per dataset and probe, over all ranks together."""

    batch_size: int | None = None
    """Records per batch; None takes the trainer's batch size for evaluation, of one device."""

    max_overhead: float | None = 0.05
    """Time of all probes / time of all training steps that is not exceeded; None: no limit."""

    resample: bool = False
    """Whether every probe draws its samples anew; else a run looks at the same ones throughout."""

    seed: int = 0
    """For the choice of samples, and for collators that draw random numbers."""

    at_start: bool = True
    """Whether step 0 is probed, before any training: where the curves begin."""

    at_end: bool = True
    """Whether the last step is probed whatever its number: where the curves end."""

    on_error: OnError | None = None
    """What an error in a probe does: "raise" ends the run, "warn" ends the probes only.

    None raises until the first probe has been logged, and warns afterwards."""

    def __post_init__(self) -> None:
        for name in ("every", "batches", "batch_size"):
            value = getattr(self, name)
            if value is None and name == "batch_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, but is {value!r}.")
        if not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number, but is {self.seed!r}.")
        limit = self.max_overhead
        if limit is not None and not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
            raise ConfigError(
                "max_overhead must be above 0 (0.05 is 5 % of the training time), or None for no "
                f"limit, but is {limit!r}."
            )
        if self.on_error not in (None, *get_args(OnError)):
            raise ConfigError(
                f'on_error must be "raise", "warn" or None, but is {self.on_error!r}.'
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> ProbeConfig:
        """From plain values (YAML); an unknown key is refused with the nearest right one."""
        refuse_unknown_keys(mapping, [field.name for field in fields(cls)], "probe config")
        return cls(**mapping)


def probe_keys(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """{name: {metric: log key}} for all that a probe may log of its datasets.

    Raises `ConfigError` for names that are empty, or that would share keys.
    """
    keys: dict[str, dict[str, str]] = {}
    owners: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"a dataset of a probe needs a non-empty name, but has {name!r}.")
        other = owners.setdefault(sanitize(name), name)
        if other != name:
            raise ConfigError(
                f"datasets {other!r} and {name!r} of a probe would both be logged as "
                f"'dataset_{sanitize(name)}_loss'; rename one of them."
            )
        bounds = [f"{metric}_{end}" for metric in _METRICS for end in ("low", "high")]
        metrics = (*_METRICS, *bounds, "nonfinite")
        keys[name] = {metric: f"dataset_{sanitize(name)}_{metric}" for metric in metrics}
    return keys


def choose(size: int, count: int, *, seed: int, name: str, draw: int = 0) -> list[int]:
    """`count` of the indices below `size` (all of them if there are no more), sorted.

    By a generator of its own: the same arguments give the same indices on every rank, and no
    other random number changes. draw: the number of the drawing, where samples are drawn anew.
    """
    rng = random.Random(f"{seed} {draw} {name}")
    return sorted(rng.sample(range(size), min(count, size)))


def deal(count: int, *, num_forwards: int, num_ranks: int, rank: int) -> list[range]:
    """The positions, of `count` samples, that `rank` has in each of its `num_forwards` batches.

    Every position is in one batch of one rank; the sizes of the batches differ by one at most.
    With fewer samples than batches, some are empty.
    """
    parts = num_forwards * num_ranks
    edges = [-(-part * count // parts) for part in range(parts + 1)]
    return [
        range(edges[part], edges[part + 1])
        for part in range(rank * num_forwards, (rank + 1) * num_forwards)
    ]


class ProbeBudget:
    """Which step is probed next, so that all probes together stay within `max_overhead`.

    It is fed with times that are the same on all ranks, so all ranks come to the same step.

    next_step: where the next probe is due. distance: the steps between two probes, for now.
    """

    def __init__(self, every: int, max_overhead: float | None, *, step: int = 0) -> None:
        self.every, self.max_overhead = every, max_overhead
        self.train_seconds = 0.0
        self.probe_seconds = 0.0
        self._last_step = step
        self.distance = every
        self.next_step = (step // every + 1) * every

    @property
    def overhead(self) -> float | None:
        """Seconds of all probes / seconds of all training steps; None before any step."""
        return self.probe_seconds / self.train_seconds if self.train_seconds else None

    def add(self, step: int, *, train_seconds: float, probe_seconds: float) -> None:
        """A probe at `step` took `probe_seconds`, and the steps since the last `train_seconds`.

        The next one is at the first multiple of `every` where the budget covers one more probe
        like this, if steps go on to take what they took.
        """
        self.train_seconds += train_seconds
        self.probe_seconds += probe_seconds
        num_steps, self._last_step = step - self._last_step, step
        intervals = 1
        if self.max_overhead is not None and num_steps > 0 and train_seconds > 0:
            needed = (self.probe_seconds + probe_seconds) / self.max_overhead - self.train_seconds
            steps_needed = needed * num_steps / train_seconds
            reached = step + max(math.ceil(steps_needed), 1)
            intervals = max(-(-reached // self.every) - step // self.every, 1)
        self.distance = intervals * self.every
        self.next_step = step // self.every * self.every + self.distance
