"""Channel metrics in ms-swift's Megatron trainer: `megatron sft` and `megatron pt`.

    megatron sft ... --external_plugins patches/ms_swift.py

or, for a trainer of one's own, `attach(trainer)`. Keys and limits: docs/ms_swift_megatron.md.

Nothing is gathered per micro-batch: sums are counted on the ranks that have losses, and reduced
once per log. Training is unchanged bit for bit.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, TypeVar

from swift.megatron.trainers.base import BaseMegatronTrainer
from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.errors import ConfigError, UnsupportedVersionError
from channel_metrics.swap import original_class, with_mixin
from channel_metrics.trainers.swift_megatron.batch import SequenceChannels, sequence_channels
from channel_metrics.trainers.swift_megatron.state import SwiftMegatronState

__all__ = ["SwiftMegatronMixin", "attach", "check_megatron_trainer", "detach"]

TrainerT = TypeVar("TrainerT")

# Methods that are extended here, and the parameters by which ms-swift calls them.
_HOOKS = {
    "_compute_channel_loss": ("self", "losses", "loss_mask", "channels", "packed_seq_params"),
    "_log_callback": ("self", "logs", "n_steps"),
    "_prepare_batch": ("self", "data", "vp_stage"),
    "evaluate": ("self", "val_data_iterator"),
    "loss_func": ("self", "output_tensor", "labels", "loss_scale", "channels", "packed_seq_params"),
    "save_checkpoint": ("self",),
    "setup_training": ("self", "train_dataset", "val_dataset"),
    "train_step": ("self", "train_data_iterator"),
}


# mypy cannot see into ms-swift. The base lets `attach` change the class of a trainer that exists.
class SwiftMegatronMixin(BaseMegatronTrainer):  # type: ignore[misc]
    """Stands before a `MegatronTrainer` class, see `attach`."""

    channel_metrics: SwiftMegatronState

    # ---- one micro-batch ------------------------------------------------------------------

    def _prepare_batch(self, data: Any, vp_stage: int | None = None) -> Any:
        given = dict(data)  # ms-swift shifts and cuts it
        batch = super()._prepare_batch(data, vp_stage)
        metrics = self.channel_metrics
        # Only the last pipeline stage keeps the labels.
        if metrics.guard.measuring and batch.get("labels") is not None:
            with metrics.guard.guarded():
                batch["channel"] = sequence_channels(self.args, given, metrics.table)
        return batch

    def loss_func(
        self,
        output_tensor: Tensor,
        *,
        labels: Tensor,
        loss_scale: Tensor | None = None,
        channels: list[str | None] | None = None,
        packed_seq_params: Any = None,
    ) -> Any:
        """ms-swift's loss, counted per channel."""
        loss_func = super().loss_func
        metrics = self.channel_metrics
        if isinstance(channels, SequenceChannels) and metrics.guard.measuring:
            with metrics.guard.guarded():
                metrics.warn_of_crossings(channels.num_crossings)
                loss_func = metrics.window.count(
                    loss_func,
                    channels=channels.ids,
                    loss_mask=labels != IGNORE_INDEX,
                    cu_seqlens=_to(channels.cu_seqlens, labels),
                    sequences=channels.sequences,
                    weights=metrics.weights(output_tensor, loss_scale),
                    reports_sum=loss_scale is None and not self.args.enable_dft_loss,
                )
        return loss_func(
            output_tensor,
            labels=labels,
            loss_scale=loss_scale,
            channels=channels,
            packed_seq_params=packed_seq_params,
        )

    def _compute_channel_loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Nothing: `loss_{channel}` comes at the log, from what was counted.

        ms-swift's own way is taken again once all ranks know that the metrics have ended.
        """
        off = self.channel_metrics.guard.off
        return super()._compute_channel_loss(*args, **kwargs) if off else {}

    # ---- windows --------------------------------------------------------------------------

    def setup_training(self, train_dataset: Any, val_dataset: Any) -> Any:
        """Learn the channels, and go on with the totals of the checkpoint."""
        metrics = self.channel_metrics
        with metrics.guard.guarded():
            metrics.declare({"train": train_dataset, "eval": val_dataset})
            if self.state.iteration:
                metrics.resume(_resumed_checkpoint(self.args))
        return super().setup_training(train_dataset, val_dataset)

    def train_step(self, train_data_iterator: Any) -> Any:
        """One step; its tokens count, whatever the optimizer does with it, as in ms-swift's log."""
        self._watch()
        result = super().train_step(train_data_iterator)
        self.channel_metrics.train.end_step()
        return result

    def evaluate(self, val_data_iterator: Any) -> Any:
        """An evaluation with a window of its own."""
        self.channel_metrics.evaluating = True
        self._watch()
        try:
            return super().evaluate(val_data_iterator)
        finally:
            self.channel_metrics.evaluating = False

    def _log_callback(self, logs: dict[str, Any], n_steps: int) -> None:
        super()._log_callback(logs, n_steps)
        metrics = self.channel_metrics
        values = metrics.window.compute()
        with metrics.guard.guarded():
            _add(values, logs)

    def save_checkpoint(self) -> Any:
        """The checkpoint, with the totals in it."""
        from swift.utils import is_master

        result = super().save_checkpoint()
        metrics = self.channel_metrics
        with metrics.guard.guarded():
            metrics.save(Path(self.state.last_model_checkpoint), is_writer=is_master())
        return result

    def _watch(self) -> None:
        metrics = self.channel_metrics
        # Not `measuring`: the tensor-parallel ranks go on together until all know of an error.
        if not metrics.guard.off:
            with metrics.guard.guarded():
                for model in self.unwrapped_models:
                    # Multimodal models hold the language model.
                    metrics.window.watch(getattr(model, "language_model", model))


def attach(trainer: TrainerT, config: MetricsConfig | None = None) -> TrainerT:
    """Give a `MegatronTrainer` channel metrics; the same object is returned.

    A second call only replaces the config. Raises `UnsupportedVersionError` for a trainer whose
    loss is not one of tokens, or if this ms-swift lacks what is needed.
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
    metrics = SwiftMegatronState(config or MetricsConfig(), changed.args)
    if not isinstance(trainer, SwiftMegatronMixin):
        changed.__class__ = with_mixin(original, SwiftMegatronMixin)
    changed.channel_metrics = metrics
    return trainer


def detach(trainer: TrainerT) -> TrainerT:
    """Undo `attach`; the trainer is of its own class again."""
    changed: Any = trainer
    if isinstance(trainer, SwiftMegatronMixin):
        # Else its models would go on to measure accuracy.
        changed.channel_metrics.guard.off = True
        changed.__class__ = original_class(type(trainer))
    if not isinstance(trainer, SwiftMegatronMixin):
        vars(trainer).pop("channel_metrics", None)
    return trainer


def check_megatron_trainer(trainer_class: type) -> None:
    """Raise `UnsupportedVersionError` unless ms-swift's part of it is as we know it."""
    import swift

    parents = [c for c in trainer_class.__mro__ if c.__module__.startswith("swift.megatron.")]
    of_swift: Any = parents[0] if parents else trainer_class
    for name, wanted in _HOOKS.items():
        method = getattr(of_swift, name, None)
        found = tuple(inspect.signature(method).parameters) if method else ()
        if found != wanted:
            raise UnsupportedVersionError(
                f"channel metrics are for ms-swift's MegatronTrainer (megatron sft, megatron pt) "
                f"with {name}{wanted}, but {of_swift.__name__} of ms-swift {swift.__version__} has "
                f"{name}{found if method else ': nothing'}; use a tested version (see "
                "docs/ms_swift_megatron.md), or leave the metrics out for this task."
            )


def _to(bounds: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bounds is None else bounds.to(like.device, non_blocking=True)


def _add(values: dict[str, float], logs: dict[str, Any]) -> None:
    for key in values:
        if key in logs:
            raise ConfigError(
                f"the metric key {key!r} is already logged by ms-swift; choose another "
                "key_format, or rename the channel."
            )
    logs.update(values)


def _resumed_checkpoint(args: Any) -> Path:
    """The folder that ms-swift took the iteration from."""
    of_weights = args.adapters[0] if args.adapters and args.tuner_type != "full" else args.model
    return Path(args.mcore_adapter or args.mcore_model or of_weights)
