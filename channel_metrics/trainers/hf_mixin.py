"""The mixin that gives a transformers Trainer channel metrics: micro-batches and windows."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.trainers.hf_batch import (
    BatchChannels,
    labels_of,
    real_records,
    take_channels,
)
from channel_metrics.trainers.hf_live import LiveTable, wants_live_table
from channel_metrics.trainers.hf_loaders import ChannelLoadersMixin
from channel_metrics.trainers.hf_loss import Observation, check_loss_hook, observe_loss
from channel_metrics.trainers.hf_parallel import shard_with_labels
from channel_metrics.trainers.hf_state import TOTALS_FILE, ChannelState

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
            self.add_callback(LiveTable(state.take_closed_window, callbacks))

    # ---- one micro-batch ------------------------------------------------------------------

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        if self.channel_metrics is not None:
            self.channel_metrics.pending = take_channels(prepared)
        return prepared

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.channel_metrics
        if state is None or not (model.training or state.evaluating):
            return super().compute_loss(model, inputs, *args, **kwargs)
        batch, state.pending = take_channels(inputs) or state.pending, None
        if batch is None:
            raise ChannelError(
                "expected `channels` in the batch, but it holds "
                f"{', '.join(inputs)}; this trainer builds its own data loader: wrap its "
                "collate_fn with channel_metrics.ChannelCollator."
            )
        if not self._rank_layout().counts(cut=state.cut):
            return super().compute_loss(model, inputs, *args, **kwargs)
        labels = labels_of(batch, inputs)
        if not isinstance(labels, Tensor):
            raise UnsupportedVersionError(
                f"channel metrics need `labels` in the batch, but {type(self).__name__} got "
                f"{', '.join(inputs)}; detach the metrics for this trainer."
            )
        with observe_loss(model, with_correct=state.with_correct) as observation:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        self._record_tokens(state, batch, labels, observation)
        return result

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.channel_metrics
        generates = getattr(self.args, "predict_with_generate", False)
        if state is None or not state.evaluating or not generates:
            return super().prediction_step(model, inputs, *args, **kwargs)
        with observe_loss(model, with_correct=state.with_correct) as observation:
            result = super().prediction_step(model, inputs, *args, **kwargs)
        # Beside generation, the Seq2SeqTrainer calls the model itself and not `compute_loss`.
        batch, state.pending = state.pending, None
        labels = self._prepare_input(inputs.get("labels"))
        if batch is not None and isinstance(labels, Tensor):
            self._record_tokens(state, batch, labels, observation)
        return result

    def _record_tokens(
        self, state: ChannelState, batch: BatchChannels, labels: Tensor, observation: Observation
    ) -> None:
        causal = None if state.captured is not None else self._is_causal()
        real = None
        if state.evaluating:
            layout = self._rank_layout()
            real = real_records(self.accelerator, layout.data_rank, layout.data_size)
        state.record(batch, labels, observation, causal=causal, real=real)

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> Any:
        context, prepared = super()._prepare_context_parallel_inputs(model, inputs)
        state = self.channel_metrics
        if state is not None:
            # In evaluation, the channels have been taken out of the batch before.
            pending = state.pending.channels if state.pending else None
            cut = shard_with_labels(context, prepared.get("channels", pending))
            state.cut, context = cut is not context, cut
        return context, prepared

    def _is_causal(self) -> bool | None:
        """Whether the model predicts the next token, by its kind; None if that is not known."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        kinds = {parent.__name__ for parent in type(model).__mro__}
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return False
        if kinds.intersection(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            return True
        return False if kinds.intersection(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) else None

    # ---- windows --------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        loop = super()._inner_training_loop
        if self.channel_metrics is not None:
            called = inspect.signature(loop).bind(*args, **kwargs).arguments
            self.channel_metrics.start_run(called.get("resume_from_checkpoint") or None)
        return loop(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        if self.channel_metrics is not None:
            totals = self.channel_metrics.totals_now()
            called = inspect.signature(super()._save_checkpoint).bind(*args, **kwargs).arguments
            # Written first: a checkpoint that is complete has its totals.
            if self.args.should_save:
                run = Path(self._get_output_dir(trial=called.get("trial")))
                name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                totals.save(run / name / TOTALS_FILE)
        return super()._save_checkpoint(*args, **kwargs)

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
        if state is not None and (regular or final):
            state.close_train(logs)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        state = self.channel_metrics
        if state is None:
            return super().evaluation_loop(*args, **kwargs)
        called = inspect.signature(transformers.Trainer.evaluation_loop).bind(self, *args, **kwargs)
        called.apply_defaults()
        state.evaluation.reset()
        state.evaluating = True
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            state.evaluating = False
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
