"""The observers that the config names: functions, the stream, budgets, stops, alerts."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from channel_metrics.acting import RULES, Sampler, StopWhen
from channel_metrics.alerting import Alerts
from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ConfigError
from channel_metrics.observers import alerts, budget, early_stopping, sampler, stream
from channel_metrics.observers.alerts import AlertObserver
from channel_metrics.observers.budget import BudgetValues, StopAt, goals_of
from channel_metrics.observers.early_stopping import EarlyStopping
from channel_metrics.observers.sampler import SamplerObserver
from channel_metrics.observers.stream import WindowStream
from channel_metrics.windows import Window

__all__ = ["Session", "adding_of", "hook", "observers_of", "sampler_of"]


class Session(
    alerts.Session,
    budget.Session,
    early_stopping.Session,
    sampler.Session,
    stream.Session,
    Protocol,
):
    """What the observers ask of a `ChannelMetrics`."""


def adding_of(
    config: MetricsConfig, session: Session, sampler: SamplerObserver | None
) -> list[Callable[[Window], dict[str, float]]]:
    """Make what adds values to the logs of windows.

    Raises:
        ConfigError: a setting does not fit what is counted.
    """
    found: list[Callable[[Window], dict[str, float]]] = []
    if config.budget or config.stop_at:
        goals = goals_of(config.stop_at, session)
        found.append(BudgetValues(config.mixture, goals, session))
    return found if sampler is None else [*found, sampler.logs]


def observers_of(
    config: MetricsConfig, session: Session, sampler: SamplerObserver | None
) -> list[Callable[[Window], Any]]:
    """Import the functions of `on_window`, and make the other observers; the sampler is the last.

    Raises:
        ConfigError: as `hook` and `Goal`.
    """
    found = [hook(path) for path in config.on_window]
    if config.stream:
        found.append(WindowStream(Path(config.stream), session))
    if config.stop_at:
        found.append(StopAt(goals_of(config.stop_at, session), session))
    stop_when = StopWhen.of(config.stop_when)
    if stop_when is not None:
        found.append(EarlyStopping(stop_when, session))
    wanted = Alerts.of(config.alerts)
    if wanted is not None:
        functions = {path: hook(path, "`to` of alerts") for path in wanted.to if ":" in path}
        found.append(AlertObserver(config, wanted, functions, session))
    return found if sampler is None else [*found, sampler]


def sampler_of(config: MetricsConfig, session: Session) -> SamplerObserver | None:
    """Make what changes the weights of a `MixedStream`; None if the config has no `sampler`.

    Raises:
        ConfigError: a setting does not fit what is counted.
    """
    settings = Sampler.of(config.sampler)
    if settings is None:
        return None
    rule = settings.rule
    if isinstance(rule, str):
        rule = None if rule in RULES else hook(rule, "rule of sampler")
    return SamplerObserver(settings, rule, session)


def hook(path: str, where: str = "on_window") -> Callable[..., Any]:
    """The function that `module:name` names.

    where: the setting that names it, for messages.

    Raises:
        ConfigError: the path has another form, or the module or name cannot be imported.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ConfigError(f"an entry of {where} must be `module:function`, but is {path!r}.")
    try:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{where} names {path!r}, but that cannot be imported ({error}); a module beside the "
            "script is found, others must be installed or on PYTHONPATH."
        ) from error
    if not callable(found):
        raise ConfigError(f"{where} names {path!r}, which is no function, but {found!r}.")
    return found
