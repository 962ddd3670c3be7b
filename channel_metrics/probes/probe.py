"""Which samples a probe measures, in which steps, and under which log keys.

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
# The sums per dataset: moments of the losses, then moments of the correct tokens.
PROBE_COLUMNS = tuple(f"{part}_{moment}" for part in ("loss", "correct") for moment in MOMENTS)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How often probes run, on how much, and what they may cost."""

    every: int = 100
    """Optimizer steps between two probes, as long as the budget allows it."""

    batches: int = 4
    """Batches per dataset and probe, over all ranks together."""

    batch_size: int | None = None
    """Records per batch; None takes the trainer's evaluation batch size of one device."""

    max_overhead: float | None = 0.05
    """The limit of time of all probes / time of all training steps; None: no limit."""

    resample: bool = False
    """Whether every probe draws new samples. If not, all probes of a run use the same samples."""

    seed: int = 0
    """For the choice of samples, and for collators that draw random numbers."""

    at_start: bool = True
    """Whether there is a probe at step 0, before any training."""

    at_end: bool = True
    """Whether there is a probe at the last step, even if it is not a multiple of `every`."""

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
    """{name: {metric: log key}} of everything that a probe may log for its datasets.

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
    """Draw `count` of the indices below `size`, or all if there are fewer; sorted.

    The same arguments give the same indices on every rank. No other random numbers change,
    because the generator is a new one.

    Args:
        size: the number of samples of the dataset.
        count: how many are wanted.
        seed, name, draw: the seed, the dataset, and the number of the drawing.
    """
    rng = random.Random(f"{seed} {draw} {name}")
    return sorted(rng.sample(range(size), min(count, size)))


def deal(count: int, *, num_forwards: int, num_ranks: int, rank: int) -> list[range]:
    """Deal `count` samples to the batches of all ranks.

    Every sample is in one batch of one rank. The sizes of the batches differ by one at most. If
    there are fewer samples than batches, some batches are empty.

    Returns:
        The positions of the samples in each of the `num_forwards` batches of `rank`.
    """
    parts = num_forwards * num_ranks
    edges = [-(-part * count // parts) for part in range(parts + 1)]
    return [
        range(edges[part], edges[part + 1])
        for part in range(rank * num_forwards, (rank + 1) * num_forwards)
    ]


class ProbeBudget:
    """Chooses the next step with a probe, so that all probes together stay within `max_overhead`.

    `add` must get the same times on all ranks, so that all ranks choose the same step.

    next_step: the step of the next probe. distance: the current number of steps between probes.
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
        """Record a probe, and choose the step of the next one.

        That is the first multiple of `every` at which the budget allows one more probe like this,
        if the following steps take as long as the last ones.

        Args:
            step: the step of the probe.
            train_seconds: the time of the training steps since the probe before.
            probe_seconds: the time of this probe.
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
