"""A check of `metric_for_best_model` before training: an evaluation must log this metric."""

from __future__ import annotations

from typing import Any

from channel_metrics.core.labels import UNLABELED
from channel_metrics.errors import ConfigError
from channel_metrics.session import ChannelMetrics

__all__ = ["check_best_metric"]


def check_best_metric(trainer: Any, session: ChannelMetrics) -> None:
    """Refuse a `metric_for_best_model` that belongs to a channel and will not be logged.

    Without this check, transformers raises `KeyError` at the first evaluation, or saves no best
    model.

    Args:
        trainer: the trainer, before training.
        session: its channel metrics.

    Raises:
        ConfigError: `eval_channels` or `metrics` leave this metric out.
    """
    wanted = trainer.args.metric_for_best_model
    # The script's own `compute_metrics` may log any key.
    if not wanted or wanted in session.keys.reserved or trainer.compute_metrics is not None:
        return
    wanted = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    config, held = session.config, trainer.eval_dataset
    prefixes = [f"eval_{name}_" for name in held] if isinstance(held, dict) else ["eval_"]
    logged = {metric.name for metric in session.schema.chosen(config.metrics)}
    for channel in (*session.labels.names, *config.eval_channels, UNLABELED):
        for metric in session.schema.metric_names:
            if wanted not in {session.keys.key(channel, metric, prefix) for prefix in prefixes}:
                continue
            if config.eval_channels and channel not in config.eval_channels:
                raise ConfigError(
                    f"metric_for_best_model is {wanted!r}, but eval_channels leaves out "
                    f"{channel!r}: it names {', '.join(config.eval_channels)}. Add it there, or "
                    "choose another metric."
                )
            if metric not in logged:
                raise ConfigError(
                    f"metric_for_best_model is {wanted!r}, but an evaluation logs only "
                    f"{', '.join(sorted(logged))} of a channel; add {metric!r} to `metrics`, or "
                    "choose another metric."
                )
            return
