"""The settings of what is done with closed windows: hooks, a stream, budgets, stops.

`MetricsConfig` has them. docs/stream.md and docs/acting.md describe them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

from channel_metrics.errors import ConfigError, hint

__all__ = [
    "RULES",
    "ActingConfig",
    "Budget",
    "Sampler",
    "Section",
    "StopWhen",
    "goals",
    "is_number",
    "numbers",
    "refuse_unknown_keys",
]

RULES = ("fixed", "loss", "excess", "speed")
"""How the weights of a sampler may follow from windows, besides functions of a user."""

SectionT = TypeVar("SectionT", bound="Section")
Mode = Literal["min", "max"]
# How names of metrics end whose better values are the lower or the higher ones.
_LOWER = ("loss", "ppl", "bits_per_byte", "bits_per_char")
_HIGHER = ("acc", "accuracy", "accuracies", "reward", "margins")


@dataclass(frozen=True, kw_only=True)
class ActingConfig:
    """What is done with closed windows. All of it is off by default."""

    on_window: tuple[str, ...] = ()
    """Functions that get each closed `Window`, by import path: `["my_module:my_function"]`.

    See docs/stream.md."""

    stream: str = ""
    """A file of JSON lines that each closed window is added to, see docs/stream.md.

    A relative path begins at the folder in which the run was started. Empty: no file."""

    budget: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the mixture should be: `{ratios: {bbu: 3, rru: 1}, records: {bbu: 60000}}`.

    Logs the shares, wanted and achieved, and the epochs over each source, see docs/acting.md."""

    stop_at: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Totals at which the run ends: `{bbu_tokens: 2e9}`; `tokens` is that of all channels."""

    stop_when: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Early stopping: `{channel: bbu, metric: eval_loss, patience: 3}`, see docs/acting.md."""

    sampler: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Weights of channels that follow from the windows: `{start: {bbu: 3, rru: 1}, rule: loss}`.

    A `MixedStream` draws its records by them, see docs/sampler.md."""

    def check_acting(self) -> None:
        """Raise `ConfigError` for a setting that is not allowed."""
        if not isinstance(self.stream, (str, os.PathLike)):
            raise ConfigError(f"stream must be the path of a file, but is {self.stream!r}.")
        object.__setattr__(self, "stream", os.fspath(self.stream))
        Budget.of(self.budget)
        goals(self.stop_at)
        StopWhen.of(self.stop_when)
        Sampler.of(self.sampler)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Settings that stand in one mapping."""

    @classmethod
    def of(cls: type[SectionT], given: Any) -> SectionT | None:
        """The settings in a mapping; None if it is empty.

        Raises:
            ConfigError: it is no mapping, a key is unknown or missing, or a value is not allowed.
        """
        where = cls._name()
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where} must be a mapping of settings, but is {given!r}.")
        if not given:
            return None
        refuse_unknown_keys(given, [one.name for one in fields(cls)], where)
        try:
            return cls(**given)
        except TypeError as error:
            raise ConfigError(f"{where} lacks a setting: {error}.") from None

    @classmethod
    def _name(cls) -> str:
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__)[1:]


@dataclass(frozen=True, kw_only=True)
class Budget(Section):
    """What the mixture should be, by channel."""

    ratios: Mapping[str, float] = field(default_factory=dict)
    """The parts of the mixture, relative to each other."""

    records: Mapping[str, float] = field(default_factory=dict)
    """How many records each source has, for the epochs."""

    tokens: Mapping[str, float] = field(default_factory=dict)
    """How many supervised tokens each source has, for the epochs; instead of its records."""

    until: Mapping[str, float] = field(default_factory=dict)
    """Totals as in `stop_at`, for the time to go only: nothing ends at them."""

    unit: Literal["samples", "tokens"] = "samples"
    """What `ratios` are parts of. Blends of Megatron and `interleave_datasets` mix records."""

    def __post_init__(self) -> None:
        for name in ("ratios", "records", "tokens", "until"):
            object.__setattr__(self, name, numbers(f"{name} of budget", getattr(self, name)))
        twice = sorted({*self.records} & {*self.tokens})
        if twice:
            raise ConfigError(
                f"budget has both records and tokens of {twice[0]!r}; give one, for its epochs."
            )
        if self.unit not in ("samples", "tokens"):
            raise ConfigError(f"unit of budget must be samples or tokens, but is {self.unit!r}.")

    def by_row(self, row_of: Callable[[str], str]) -> Budget:
        """This budget with the row of each channel or label; `until` has names of totals."""
        sources = (self.ratios, self.records, self.tokens)
        ratios, records, tokens = ({row_of(n): v for n, v in of.items()} for of in sources)
        return replace(self, ratios=ratios, records=records, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class StopWhen(Section):
    """When a run ends early: after `patience` windows in a row without a better value."""

    metric: str
    """With the prefix of the evaluation: `eval_loss`; or an objective: `eval_macro_loss`."""

    channel: str = ""
    """The channel, or `axis/label`; empty for an objective."""

    patience: int = 1
    """How many windows in a row may be no better than the best."""

    min_delta: float = 0.0
    """By how much a value must be better than the best to count as better."""

    mode: Mode | None = None
    """`min` if lower values are better, `max` if higher ones are.

    It is known for losses, perplexities, accuracies and rewards."""

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f"metric of stop_when must be a name, but is {self.metric!r}.")
        if not isinstance(self.channel, str):
            raise ConfigError(f"channel of stop_when must be a name, but is {self.channel!r}.")
        if type(self.patience) is not int or self.patience < 1:
            raise ConfigError(
                f"patience of stop_when must be a whole number above 0, but is {self.patience!r}."
            )
        if not is_number(self.min_delta) or self.min_delta < 0:
            raise ConfigError(
                f"min_delta of stop_when must be a number, 0 or more, but is {self.min_delta!r}."
            )
        mode = self.mode
        if mode is None and self.metric.endswith((*_LOWER, "loss_of_channels")):
            mode = "min"
        elif mode is None and self.metric.endswith(_HIGHER):
            mode = "max"
        if mode not in get_args(Mode):
            raise ConfigError(
                f"mode of stop_when must be min or max for the metric {self.metric!r}, but is "
                f"{self.mode!r}; say which values are better."
            )
        object.__setattr__(self, "mode", mode)


@dataclass(frozen=True, kw_only=True)
class Sampler(Section):
    """How the weights of channels follow from the train windows."""

    start: Mapping[str, float]
    """The channels, and their weights at first, relative to each other."""

    rule: Any = "loss"
    """`fixed`, `loss`, `excess`, `speed`, or a function, also by import path: `my_module:rule`."""

    smoothing: float = 0.0
    """The part of the old weights that a new window leaves, from 0 to below 1."""

    min: float = 0.0
    """The lowest weight of a channel; the sum of all weights is 1."""

    max: float = 1.0
    """The highest weight of a channel."""

    warmup: int = 0
    """The train windows after which the weights follow."""

    rate: float = 1.0
    """The step size of the rule `excess`."""

    reference: Mapping[str, float] = field(default_factory=dict)
    """The losses of a reference model for the rule `excess`, if there is no `excess_loss`."""

    def __post_init__(self) -> None:
        for name in ("start", "reference"):
            object.__setattr__(self, name, numbers(f"{name} of sampler", getattr(self, name)))
        path = isinstance(self.rule, str) and (self.rule in RULES or ":" in self.rule)
        if not path and not callable(self.rule):
            raise ConfigError(
                f"rule of sampler must be {', '.join(RULES)}, or `module:function`, but is "
                f"{self.rule!r}."
            )
        given = (self.smoothing, self.min, self.max, self.rate)
        if not all(map(is_number, given)) or not 0 <= self.smoothing < 1 or self.rate <= 0:
            raise ConfigError(
                "smoothing, min, max and rate of sampler must be numbers, smoothing from 0 to "
                f"below 1 and rate above 0, but they are {', '.join(map(repr, given))}."
            )
        count = len(self.start)
        if not 0 <= self.min * count <= 1 <= self.max * count or self.max > 1:
            raise ConfigError(
                f"min and max of sampler must allow {count} weights with the sum 1, but are "
                f"{self.min} and {self.max}; min must be at most {1 / max(count, 1):.4g}, and max "
                "at least that."
            )
        if type(self.warmup) is not int or self.warmup < 0:
            raise ConfigError(
                f"warmup of sampler must be a whole number, 0 or more, but is {self.warmup!r}."
            )
        if self.reference and self.reference.keys() != self.start.keys():
            raise ConfigError(
                f"reference of sampler must have the channels of start, {', '.join(self.start)}, "
                f"but has {', '.join(self.reference)}."
            )


def goals(stop_at: Any) -> dict[str, float]:
    """{`bbu_tokens`: number} of `stop_at`; raises `ConfigError` for what is none."""
    return numbers("stop_at", stop_at)


def refuse_unknown_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known.

    Args:
        mapping: the settings that were given.
        known: the keys that are allowed.
        where: what the error message calls the mapping.

    Raises:
        ConfigError: for the first unknown key. The message suggests the most similar known one.
    """
    known = list(known)
    for key in mapping:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {where}; {hint(str(key), known)}")


def numbers(where: str, given: Any) -> dict[str, float]:
    """A mapping of names to numbers above 0; raises `ConfigError` for what is none."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be a mapping of names to numbers, but is {given!r}.")
    found = {}
    for name, value in given.items():
        try:
            # YAML takes 2e9 for a text.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ConfigError(f"{name!r} in {where} must be a number above 0, but is {value!r}.")
        found[str(name)] = number
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
