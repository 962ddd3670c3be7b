"""The mixin that gives a transformers Trainer channel metrics: micro-batches and windows."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from channel_metrics.capture.observation import Observation
from channel_metrics.capture.transformers import check_loss_hook, is_causal
from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.observers.live_table import LiveTable, wants_live_table
from channel_metrics.trainers.hf.batch import (
    BatchChannels,
    labels_of,
    real_records,
    take_channels,
)
from channel_metrics.trainers.hf.callbacks import tell_callbacks
from channel_metrics.trainers.hf.loaders import ChannelLoadersMixin
from channel_metrics.trainers.hf.parallel import shard_with_labels
from channel_metrics.trainers.hf.state import TOTALS_FILE, ChannelState

__all__ = ["ChannelMetricsMixin", "check_trainer"]

_HOOKS = (
    "_get_collator_with_removed_columns",
    "_inner_training_loop",
    "_maybe_log_save_evaluate",
    "_prepare_inputs",
    "_remove_unused_columns",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
    "compute_loss",
    "evaluation_loop",
    "get_eval_dataloader",
    "get_test_dataloader",
    "get_train_dataloader",
    "log",
    "prediction_step",
)


class ChannelMetricsMixin(ChannelLoadersMixin):
    """Put before a Trainer class: `class MyTrainer(ChannelMetricsMixin, Trainer)`.

    channel_metrics: the config, as keyword of the constructor; None takes the defaults.
    """

    state_class: type[ChannelState] = ChannelState

    def __init__(
        self, *args: Any, channel_metrics: MetricsConfig | None = None, **kwargs: Any
    ) -> None:
        check_trainer(type(self))
        super().__init__(*args, **kwargs)
        self.start_channel_metrics(channel_metrics or MetricsConfig())

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        """Open the windows, for a trainer that has been made; a second call replaces them."""
        state = self.state_class(config)
        state.alone = self.accelerator.num_processes == 1
        self.channel_metrics = state
        self.pop_callback(LiveTable)
        if config.live_table and wants_live_table(self):
            callbacks = self.callback_handler.callbacks
            self.add_callback(LiveTable(state.take_closed_window, callbacks, state.guard))

    def _shielded(self, original: Any, observing: Any, *args: Any, **kwargs: Any) -> Any:
        """`original`, observed where metrics are on, see `FaultGuard.shielded`."""
        if self.channel_metrics is None:
            return original(*args, **kwargs)
        return self.channel_metrics.guard.shielded(original, observing, *args, **kwargs)

    # ---- one micro-batch ------------------------------------------------------------------

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        if self.channel_metrics is not None:
            # Also where metrics are off: the model must not see our keys.
            self.channel_metrics.pending = take_channels(prepared)
        return prepared

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return self._shielded(super().compute_loss, self._observed_loss, *args, **kwargs)

    def _observed_loss(
        self, compute: Any, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """What `compute` returns; the tokens it saw are recorded."""
        state = self.channel_metrics
        if state is None or not (model.training or state.evaluating):
            return compute(model, inputs, *args, **kwargs)
        batch, state.pending = take_channels(inputs) or state.pending, None
        if batch is None:
            raise ChannelError(
                "expected `channels` in the batch, but it holds "
                f"{', '.join(inputs)}; this trainer builds its own data loader: wrap its "
                "collate_fn with channel_metrics.ChannelCollator."
            )
        if not self._rank_layout().counts(cut=state.cut):
            return compute(model, inputs, *args, **kwargs)
        labels = self._labels_of(batch, inputs)
        if not isinstance(labels, Tensor):
            raise UnsupportedVersionError(
                f"channel metrics need `labels` in the batch, but {type(self).__name__} got "
                f"{', '.join(inputs)}; detach the metrics for this trainer."
            )
        with state.reader.observe(model) as observation:
            result = compute(model, inputs, *args, **kwargs)
        self._record_tokens(state, batch, labels, observation)
        return result

    def _labels_of(self, batch: BatchChannels, inputs: Any) -> Any:
        """The labels that the channels stand beside."""
        return labels_of(batch, inputs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._shielded(super().prediction_step, self._observed_step, *args, **kwargs)

    def _observed_step(self, step: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.channel_metrics
        generates = getattr(self.args, "predict_with_generate", False)
        if state is None or not state.evaluating or not generates:
            return step(model, inputs, *args, **kwargs)
        with state.reader.observe(model) as observation:
            result = step(model, inputs, *args, **kwargs)
        # Beside generation, the Seq2SeqTrainer calls the model itself and not `compute_loss`.
        batch, state.pending = state.pending, None
        labels = self._prepare_input(inputs.get("labels"))
        if batch is not None and isinstance(labels, Tensor):
            self._record_tokens(state, batch, labels, observation)
        return result

    def _record_tokens(
        self, state: ChannelState, batch: BatchChannels, labels: Tensor, observation: Observation
    ) -> None:
        causal = None if state.reader.captured is not None else self._is_causal()
        real = None
        if state.evaluating:
            layout = self._rank_layout()
            real = real_records(self.accelerator, layout.data_rank, layout.data_size)
        state.record(batch, labels, observation, causal=causal, real=real)

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> Any:
        context, prepared = super()._prepare_context_parallel_inputs(model, inputs)
        state = self.channel_metrics
        if state is not None and state.guard.measuring:
            with state.guard.guarded():
                # In evaluation, the channels have been taken out of the batch before.
                pending = state.pending.channels if state.pending else None
                cut = shard_with_labels(context, prepared.get("channels", pending))
                state.cut, context = cut is not context, cut
        return context, prepared

    def _is_causal(self) -> bool | None:
        """Whether the model predicts the next token, by its kind; None if that is not known."""
        return is_causal(self.accelerator.unwrap_model(self.model))

    # ---- windows --------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        loop = super()._inner_training_loop
        tell_callbacks(self)
        if self.channel_metrics is not None:
            with self.channel_metrics.guard.guarded():
                called = inspect.signature(loop).bind(*args, **kwargs).arguments
                self.channel_metrics.start_run(called.get("resume_from_checkpoint") or None)
        return loop(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        state = self.channel_metrics
        if state is not None and not state.guard.off:
            with state.guard.guarded():
                self._save_totals(state, *args, **kwargs)
        return super()._save_checkpoint(*args, **kwargs)

    def _save_totals(self, state: ChannelState, *args: Any, **kwargs: Any) -> None:
        totals = state.totals_now()
        # Subclasses take anything and pass it on.
        bound = inspect.signature(transformers.Trainer._save_checkpoint).bind(self, *args, **kwargs)
        # Written first: a checkpoint that is complete has its totals.
        if self.args.should_save:
            run = Path(self._get_output_dir(trial=bound.arguments.get("trial")))
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            totals.save(run / name / TOTALS_FILE)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        state = self.channel_metrics
        if state is None:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        state.in_training_loop = True
        try:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            state.in_training_loop = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        state = self.channel_metrics
        # Only the logs of the training loop itself are called on every rank, and only they
        # close a window: the one with `loss`, and the last one of the run.
        regular = state is not None and state.in_training_loop and "loss" in logs
        final = "train_loss" in logs and "train_runtime" in logs
        if state is not None and (regular or final) and not state.guard.off:
            with state.guard.guarded():
                state.close_train(logs)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        state = self.channel_metrics
        if state is None or state.guard.off:
            return super().evaluation_loop(*args, **kwargs)
        state.evaluation.reset()
        state.evaluating = True
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            state.evaluating = False
        with state.guard.guarded():
            loop = inspect.signature(transformers.Trainer.evaluation_loop)
            called = loop.bind(self, *args, **kwargs)
            called.apply_defaults()
            assert output.metrics is not None
            state.close_evaluation(output.metrics, f"{called.arguments['metric_key_prefix']}_")
        return output


def check_trainer(trainer_class: type) -> None:
    """Raise `UnsupportedVersionError` unless the class has all methods that we extend."""
    check_loss_hook()
    missing = [name for name in _HOOKS if not hasattr(trainer_class, name)]
    if missing:
        raise UnsupportedVersionError(
            f"channel metrics extend {len(_HOOKS)} methods of the Trainer, but "
            f"{trainer_class.__name__} of transformers {transformers.__version__} lacks "
            f"{', '.join(missing)}; use a tested version (see README)."
        )
