"""The observer that makes the weights of channels from train windows; `MixedStream` draws by them.

The weight with which the last record of a window was drawn is in its log: `bbu_weight`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from channel_metrics.acting import Sampler
from channel_metrics.config import MetricsConfig
from channel_metrics.core.keys import KeyBook
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.names import split_name
from channel_metrics.core.totals import RunTotals
from channel_metrics.data import weights as rules
from channel_metrics.data.mixed_stream import Plan
from channel_metrics.errors import ChannelMetricsError, ConfigError
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.windows import Window

__all__ = ["SamplerObserver", "Session"]

_NOTE, _COUNT = "sampler", "samples_total"

Scores = Mapping[str, float]


class Session(Protocol):
    """What this observer asks of a `ChannelMetrics`."""

    config: MetricsConfig
    keys: KeyBook
    totals: RunTotals
    ranks: Ranks

    def warn_once(self, message: str, *values: object) -> None:
        """Warn."""


class SamplerObserver:
    """Changes the weights after each train window, on all ranks alike.

    What it remembers stands in the checkpoints, beside the totals, which tell how many records of
    each channel were drawn.

    Args:
        settings: of the config.
        rule: the function of a user: takes the window and {channel: weight so far}, and returns
            {channel: score}. None for one of the named rules.
        session: its totals count the records.

    Raises:
        ConfigError: the rule needs what is not measured.
    """

    def __init__(
        self, settings: Sampler, rule: Callable[[Window, Scores], Scores] | None, session: Session
    ) -> None:
        self.settings, self._function, self._session = settings, rule, session
        self._plan: Plan | None = None
        self._lag = 0
        schema = session.totals.schema
        if not {"samples", "tokens", "nll"} <= {*schema.column_names}:
            raise ConfigError(
                f"sampler needs losses of tokens and counted samples, but this trainer counts "
                f"{schema.unit} ({', '.join(schema.column_names)}); remove the setting."
            )
        measured = settings.reference or "excess_loss" in session.config.metrics
        if settings.rule == "excess" and not measured:
            raise ConfigError(
                "the rule excess of sampler needs the losses of a reference model; give them as "
                "reference: {CHANNEL: loss}, or add excess_loss to metrics."
            )

    def drive(self, plan: Plan, lag: int) -> None:
        """Change this plan from now on; see `MixedStream.follow`."""
        if {*plan.names} != {*self.settings.start}:
            raise ConfigError(
                f"start of sampler must name the sources of the stream, {', '.join(plan.names)}, "
                f"but names {', '.join(self.settings.start)}."
            )
        self._plan, self._lag = plan, lag
        self.begin()

    def followed(self) -> Plan:
        """The plan that this observer changes; raises `ConfigError` if there is none."""
        if self._plan is None:
            raise ConfigError(
                "the config has `sampler`, but no dataset follows it; the training set must be a "
                "MixedStream, in a loop of your own after MixedStream.follow(metrics); or remove "
                "the setting."
            )
        return self._plan

    def begin(self) -> None:
        """Begin a run, or go on with one: the totals and notes of the session are those of it."""
        if self._plan is None:
            return
        names, notes = self._plan.names, self._session.totals.notes
        counts = self._counts()
        position = counts.total()
        if {*notes.get(_NOTE, {}).get("weights", names)} != {*names}:
            self._session.warn_once(
                "the checkpoint has weights of other channels; the weights begin anew."
            )
            del notes[_NOTE]
        start = self.settings.start
        whole = math.fsum(start.values())
        first = rules.bounded(
            {name: start[name] / whole for name in names}, self.settings.min, self.settings.max
        )
        own = notes.setdefault(
            _NOTE, {"weights": first, "plan": [[position, first]], "windows": 0, "points": {}}
        )
        entries = [(draw, [weights[name] for name in names]) for draw, weights in own["plan"]]
        self._plan.begin(entries, position, [counts[name] for name in names])

    def logs(self, window: Window) -> dict[str, float]:
        """{log key: weight} of a train window."""
        if window.split != "train" or not window.has_counts or self._plan is None:
            return {}
        held = self._plan.at(max(self._counts().total() - 1, self._plan.entries[0][0]))
        key = self._session.keys.key
        return {key(name, "weight"): w for name, w in zip(self._plan.names, held, strict=True)}

    def __call__(self, window: Window) -> None:
        """Change the weights after a train window."""
        if window.split != "train":
            return
        plan, counts = self.followed(), self._counts()
        own, settings = self._session.totals.notes[_NOTE], self.settings
        position = counts.total()
        scores = self._checked(self._scores(window, own))
        own["windows"] += 1
        if scores and own["windows"] > settings.warmup:
            own["weights"] = rules.followed(
                own["weights"],
                scores,
                smoothing=settings.smoothing,
                least=settings.min,
                most=settings.max,
            )
        plan.change(position + self._lag, [own["weights"][name] for name in plan.names])
        self._check_drawn(plan, counts, position)
        plan.move(position, [counts[name] for name in plan.names])
        own["plan"] = [
            [draw, dict(zip(plan.names, weights, strict=True))] for draw, weights in plan.entries
        ]

    def _counts(self, key: str = _COUNT) -> Counter[str]:
        """How many records, or tokens, of each channel were trained on since the run began."""
        totals = self._session.totals.by_row(_channel)
        return Counter({name: of_channel[key] for name, of_channel in totals.items()})

    def _scores(self, window: Window, own: dict[str, Any]) -> Scores:
        """What the rule gives for the channels of a window."""
        settings, weights = self.settings, own["weights"]
        if self._function is not None:
            return self._function(window, dict(weights))
        sums = {name: window.sums(name) for name in settings.start}
        tokens = {name: of["tokens"] - of["nonfinite"] for name, of in sums.items()}
        losses = {name: sums[name]["nll"] / tokens[name] for name in sums if tokens[name]}
        start = settings.start
        if settings.rule == "loss":
            return {name: start[name] * loss for name, loss in losses.items()}
        if settings.rule == "excess":
            reference = settings.reference
            excess = (
                {name: loss - reference[name] for name, loss in losses.items()}
                if reference
                else {
                    name: window.values[name]["excess_loss"]
                    for name in losses
                    if "excess_loss" in window.values.get(name, {})
                }
            )
            return rules.excess_scores(weights, excess, settings.rate)
        return self._speeds(own, losses, tokens) if settings.rule == "speed" else {}

    def _speeds(self, own: dict[str, Any], losses: Scores, tokens: Scores) -> Scores:
        """Scores after ADO: start * sqrt(weight * (1 - weight)) * learning speed."""
        so_far = self._counts("tokens_total").total()
        points, weights, start = own["points"], own["weights"], self.settings.start
        if own["windows"] < self.settings.warmup:
            return {}
        for name, loss in losses.items():
            of_channel = points.setdefault(name, [])
            rules.add_point(of_channel, so_far, loss * tokens[name], tokens[name])
        speeds = {name: rules.speed(points[name], so_far) for name in losses}
        known = {name: speed for name, speed in speeds.items() if speed is not None}
        if len(known) < len(speeds):
            return {}  # until all of them have a curve
        return {
            name: start[name] * math.sqrt(weights[name] * (1 - weights[name])) * speed
            for name, speed in known.items()
        }

    def _checked(self, scores: Any) -> dict[str, float]:
        """What a rule has returned; raises `ConfigError` for anything but scores."""
        names = self.settings.start
        if not isinstance(scores, Mapping) or not all(
            name in names and isinstance(score, (int, float)) and 0 <= score < math.inf
            for name, score in scores.items()
        ):
            raise ConfigError(
                "the rule of sampler must return {channel: finite number, 0 or more} for some of "
                f"{', '.join(names)}, but returned {scores!r}."
            )
        return {name: float(score) for name, score in scores.items()}

    def _check_drawn(self, plan: Plan, counts: Counter[str], position: int) -> None:
        """Compare what was trained on with what was drawn on this rank."""
        if not any(counts[name] for name in plan.names):
            raise ConfigError(
                f"no record of {', '.join(plan.names)}, the channels of sampler, was trained on so "
                f"far, but {', '.join(counts) or 'nothing'}; the sources of the stream must have "
                "the names of the channels."
            )
        drawn = int(plan.drawn.max())
        ahead = drawn - position
        if ahead > self._lag:
            raise ChannelMetricsError(
                f"a MixedStream has given {drawn} records when {position} were trained on, but its "
                f"lag is {self._lag}; make it at least {ahead}: prefetch_factor * num_workers "
                "batches of all ranks, and one more in transformers and Lightning. After a "
                "resume, the trainer must not skip batches by itself (transformers: "
                "ignore_data_skip=True)."
            )
        # On other ranks, the workers of a loader may only have begun: the first rank reads for all.
        if ahead <= -plan.spread and self._session.ranks.rank == 0:
            raise ChannelMetricsError(
                f"{position} records were trained on, but a MixedStream has given only {drawn}: "
                "each record must be one sequence, and all training data must come from it."
            )


def _channel(name: str | None) -> list[str]:
    """The channel of a joint name."""
    return [(name and split_name(name)[0]) or UNLABELED]
