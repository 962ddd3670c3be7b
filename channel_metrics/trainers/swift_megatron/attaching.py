"""Channel metrics in ms-swift's Megatron trainer: `megatron sft` and `megatron pt`.

    megatron sft ... --external_plugins patches/ms_swift.py

In your own code, use `attach(trainer)`. Keys and limits: docs/ms_swift_megatron.md.

Nothing is gathered per micro-batch. The ranks that have losses count them, and the sums are
reduced once per log. Training stays the same bit for bit.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from channel_metrics.config import MetricsConfig
from channel_metrics.core.schema import TOKENS
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.swap import original_class, with_mixin
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.swift.schema import schema_with_own_loss
from channel_metrics.trainers.swift_megatron.mixin import HOOKS, SwiftMegatronMixin

__all__ = ["MEGATRON_RESERVED_KEYS", "attach", "check_megatron_trainer", "detach"]

TrainerT = TypeVar("TrainerT")

# Keys that ms-swift's Megatron trainers log themselves.
MEGATRON_RESERVED_KEYS = frozenset(
    f"{mode}{key}"
    for mode in ("", "eval_")
    for key in (
        "global_load_balancing_loss",
        "grad_norm",
        "indexer_loss",
        "learning_rate",
        "load_balancing_loss",
        "loss",
        "seq_load_balancing_loss",
        "z_loss",
        *(f"mtp_{depth}_loss" for depth in range(1, 9)),
    )
)


def attach(trainer: TrainerT, config: MetricsConfig | None = None) -> TrainerT:
    """Give a `MegatronTrainer` channel metrics; the same object is returned.

    A second call only replaces the config.

    Raises:
        UnsupportedVersionError: for a task without token losses, or an ms-swift that we do not
            know.
        ConfigError: for keys that ms-swift logs itself.
    """
    changed: Any = trainer
    original: Any = type(trainer)
    if not isinstance(trainer, SwiftMegatronMixin):
        check_megatron_trainer(original)
    task = changed.args.task_type
    if task != "causal_lm":
        raise UnsupportedVersionError(
            f"channel metrics are for the loss of language models (task_type causal_lm), but this "
            f"run has task_type {task}; leave the metrics out for it."
        )
    session = _new_session(config or MetricsConfig(), changed.args)
    if not isinstance(trainer, SwiftMegatronMixin):
        changed.__class__ = with_mixin(original, SwiftMegatronMixin)
    template = getattr(trainer, "template", None)
    session.read_tokenizer(getattr(template, "tokenizer", None))
    session.token_axes.read_ids(*(getattr(template, of, None) for of in ("processor", "config")))
    changed.channel_metrics = session
    changed.channel_counting = MegatronChannelMetrics(session=session)
    return trainer


def detach(trainer: TrainerT) -> TrainerT:
    """Undo `attach`; the trainer gets its own class back."""
    changed: Any = trainer
    if isinstance(trainer, SwiftMegatronMixin):
        # Its models must not measure accuracy any more.
        changed.channel_metrics.guard.off = True
        changed.__class__ = original_class(type(trainer))
    if not isinstance(trainer, SwiftMegatronMixin):
        for name in ("channel_metrics", "channel_counting", "channel_evaluation"):
            vars(trainer).pop(name, None)
    return trainer


def check_megatron_trainer(trainer_class: type) -> None:
    """Raise `UnsupportedVersionError` unless it has the methods of ms-swift that we extend."""
    import swift

    parents = [c for c in trainer_class.__mro__ if c.__module__.startswith("swift.megatron.")]
    of_swift: Any = parents[0] if parents else trainer_class
    for name, wanted in HOOKS.items():
        method = getattr(of_swift, name, None)
        found = tuple(inspect.signature(method).parameters) if method else ()
        if found != wanted:
            raise UnsupportedVersionError(
                f"channel metrics are for ms-swift's MegatronTrainer (megatron sft, megatron pt) "
                f"with {name}{wanted}, but {of_swift.__name__} of ms-swift {swift.__version__} has "
                f"{name}{found if method else ': nothing'}; use a tested version (see "
                "docs/ms_swift_megatron.md), or leave the metrics out for this task."
            )


def _new_session(config: MetricsConfig, args: Any) -> ChannelMetrics:
    with_own_loss = args.enable_channel_loss
    schema = schema_with_own_loss(config.key_format, _as_written) if with_own_loss else TOKENS
    return ChannelMetrics(
        config, reserved=MEGATRON_RESERVED_KEYS, rewrite=_as_written, schema=schema
    )


def _as_written(key: str) -> str:
    """The key that ms-swift's writers log (swift.megatron.callbacks.utils)."""
    return key.replace("/", "_")
