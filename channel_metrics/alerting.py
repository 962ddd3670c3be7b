"""The settings of alerts and outliers. `MetricsConfig` has them; see docs/acting.md."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from channel_metrics.acting import ActingConfig, Section, is_number
from channel_metrics.errors import ConfigError, hint

__all__ = ["ALERTS_FILE", "KINDS", "TARGETS", "AlertingConfig", "Alerts", "Outliers"]

KINDS = (
    "forgetting",
    "overfitting",
    "nonfinite",
    "starved",
    "share",
    "unlabeled",
    "exhausted",
)
ALERTS_FILE = "alerts.jsonl"
TARGETS = ("logger", "trackio", "wandb", "webhook")
# Kinds that need a part of the setting `budget`.
_NEEDS = {"share": ("ratios",), "exhausted": ("records", "tokens")}


@dataclass(frozen=True, kw_only=True)
class AlertingConfig(ActingConfig):
    """What is watched for."""

    alerts: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What is watched for, and who is told: `{to: [logger, wandb], rate: 0.05}`.

    See docs/acting.md."""

    outliers: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The sequences with the highest and lowest loss per channel and window, in files:
    `{folder: runs/a/outliers, count: 5, id_field: id}`. See docs/acting.md."""

    @property
    def outliers_id(self) -> str:
        """The field of a record with its id, for `outliers`; empty if it is not needed."""
        outliers = Outliers.of(self.outliers)
        return outliers.id_field if outliers is not None else ""

    def check_acting(self) -> None:
        """Raise `ConfigError` for a setting that is not allowed."""
        super().check_acting()
        Outliers.of(self.outliers)
        alerts = Alerts.of(self.alerts)
        if alerts is not None:
            alerts.check(self.budget)


@dataclass(frozen=True, kw_only=True)
class Alerts(Section):
    """What is watched for, and who is told."""

    to: tuple[str, ...] = ("logger",)
    """Who is told: `logger`, `trackio`, `wandb`, `webhook`, or a function as `module:name`."""

    kinds: tuple[str, ...] = ()
    """Which alerts there are, see docs/acting.md. Empty: all that the settings allow."""

    rate: float = 0.05
    """The chance of a false alert by a test, in the whole run: of losses, absences and shares."""

    share: float = 0.02
    """By how much a share may differ from that of `budget`."""

    unlabeled: float = 0.01
    """The highest share of a window that may have no channel."""

    epochs: float = 1.0
    """After so many passes over the records of a source, it counts as exhausted."""

    cooldown: int = 50
    """At least so many windows are between two alerts of one kind about one channel."""

    webhook: str = "CHANNEL_METRICS_WEBHOOK"
    """The environment variable that holds the address of the webhook."""

    file: str = ""
    """A file of JSON lines for the alerts. By default, alerts.jsonl beside the `stream`."""

    def __post_init__(self) -> None:
        for name in ("to", "kinds"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                raise ConfigError(f"{name} of alerts must be a list of names, but is {value!r}.")
            object.__setattr__(self, name, tuple(value))
        for name in self.to:
            if name not in TARGETS and ":" not in name:
                raise ConfigError(
                    f"{name!r} in `to` of alerts is no target and no `module:function`; "
                    f"{hint(name, TARGETS)}"
                )
        for name in self.kinds:
            if name not in KINDS:
                raise ConfigError(f"{name!r} in kinds of alerts is none; {hint(name, KINDS)}")
        for name, high in (("rate", 1.0), ("share", 1.0), ("unlabeled", 1.0), ("epochs", None)):
            value = getattr(self, name)
            if not is_number(value) or value <= 0 or (high is not None and value >= high):
                end = "a number above 0" if high is None else "between 0 and 1"
                raise ConfigError(f"{name} of alerts must be {end}, but is {value!r}.")
        if type(self.cooldown) is not int or self.cooldown < 0:
            raise ConfigError(
                f"cooldown of alerts must be a whole number, 0 or more, but is {self.cooldown!r}."
            )
        if not isinstance(self.webhook, str) or not self.webhook or "/" in self.webhook:
            raise ConfigError(
                "webhook of alerts must be the name of an environment variable. The address "
                "itself is a secret, and belongs into that variable."
            )
        if not isinstance(self.file, (str, os.PathLike)):
            raise ConfigError(f"file of alerts must be the path of a file, but is {self.file!r}.")
        object.__setattr__(self, "file", os.fspath(self.file))

    def check(self, budget: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for a kind that was asked for and needs more of `budget`."""
        for kind, parts in _NEEDS.items():
            if kind in self.kinds and not set(parts).intersection(budget):
                raise ConfigError(
                    f"alerts of the kind {kind!r} need `{'` or `'.join(parts)}` in the setting "
                    "`budget`."
                )

    def chosen(self, budget: Mapping[str, Any]) -> frozenset[str]:
        """The kinds that are watched for."""
        possible = (k for k in KINDS if k not in _NEEDS or set(_NEEDS[k]).intersection(budget))
        return frozenset(self.kinds or possible)


@dataclass(frozen=True, kw_only=True)
class Outliers(Section):
    """Which sequences are written."""

    folder: str
    """The folder of the files, one per rank."""

    count: int = 5
    """So many with the highest and so many with the lowest loss, per channel, window and rank."""

    id_field: str = "id"
    """The field of a record with its id, such as `meta.id`; `@index`: its place in the dataset of
    a transformers Trainer; empty: none."""

    text_tokens: int = 64
    """The text of so many supervised tokens is written, if there is a tokenizer; 0: no text."""

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)) or not os.fspath(self.folder):
            raise ConfigError(f"folder of outliers must be a path, but is {self.folder!r}.")
        object.__setattr__(self, "folder", os.fspath(self.folder))
        for name, least in (("count", 1), ("text_tokens", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(
                    f"{name} of outliers must be a whole number, {least} or more, but is {value!r}."
                )
        if not isinstance(self.id_field, str):
            raise ConfigError(f"id_field of outliers must be a name, but is {self.id_field!r}.")
