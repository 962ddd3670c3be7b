"""The log keys of a trainer's evaluations, as far as they are known before training."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from channel_metrics.core.objectives import WEIGHTED
from channel_metrics.errors import ConfigError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers import wanted as wanted_keys

__all__ = ["check_best_metric", "check_stop_when", "declare_evaluations", "own_keys"]

# What transformers logs of each evaluation, after its prefix.
_OWN = ("loss", "runtime", "samples_per_second", "steps_per_second")
# Names that differ by one letter are closer than this, and those that mean something else are not.
_CLOSE = 0.9


def own_keys(prefixes: Iterable[str]) -> list[str]:
    """The keys that transformers itself logs in evaluations with these prefixes."""
    return [prefix + name for prefix in prefixes for name in _OWN]


def declare_evaluations(trainer: Any, session: ChannelMetrics) -> None:
    """Learn the keys of the evaluations to come, so that a channel with one of them is an error.

    Args:
        trainer: the trainer, before training.
        session: its channel metrics.

    Raises:
        ConfigError, ChannelError: a known channel would share a key.
    """
    prefixes = list(_sets(trainer))
    errors = session.keys.reserve(own_keys(prefixes))
    if trainer.args.eval_strategy != "no":
        for prefix in prefixes:
            errors += session.keys.learn(prefix=prefix)
    for error in errors:
        raise error


def check_best_metric(trainer: Any, session: ChannelMetrics) -> None:
    """Refuse a `metric_for_best_model` that belongs to a channel and will not be logged.

    Without this check, transformers raises `KeyError` at the first evaluation, or saves no best
    model. Keys that may be the script's own are let be.

    Args:
        trainer: the trainer, before training.
        session: its channel metrics.

    Raises:
        ConfigError: no evaluation will log this metric.
    """
    wanted, sets = trainer.args.metric_for_best_model, _sets(trainer)
    if not wanted:
        return
    wanted = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    session.keys.watched.add(wanted)
    # The script's own `compute_metrics` may log any key.
    if not sets or trainer.compute_metrics is not None or wanted in session.keys.reserved:
        return
    if wanted.endswith(WEIGHTED) and trainer.args.greater_is_better:
        raise ConfigError(
            f"metric_for_best_model is {wanted!r}, a loss, but greater_is_better is True, which "
            'transformers assumes for names that do not end in "loss"; set it to False.'
        )
    held = {prefix: trainer.channel_names(session, dataset) for prefix, dataset in sets.items()}
    logged = wanted_keys.check_wanted(session, wanted, held, "metric_for_best_model")
    near = difflib.get_close_matches(wanted, logged, n=1, cutoff=_CLOSE)
    if wanted not in logged and near and None not in held.values():
        raise ConfigError(
            f"metric_for_best_model is {wanted!r}, which no evaluation logs; did you mean "
            f"{near[0]!r}?"
        )


def check_stop_when(trainer: Any, session: ChannelMetrics) -> None:
    """Refuse a `stop_when` that no window will have; raises `ConfigError`."""
    if session.config.stop_when:
        sets = {"": trainer.train_dataset, **_sets(trainer)}
        names = {prefix: trainer.channel_names(session, data) for prefix, data in sets.items()}
        wanted_keys.check_stop_when(session, names)


def _sets(trainer: Any) -> dict[str, Any]:
    """{prefix of its keys: dataset} of the evaluations; empty if there are none."""
    held = trainer.eval_dataset
    if isinstance(held, dict):
        return {f"eval_{name}_": dataset for name, dataset in held.items()}
    return {} if held is None else {"eval_": held}
