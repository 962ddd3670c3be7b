"""Channel metrics in the transformers Trainer, and in trainers built on it.

    trainer = Trainer(model, args, train_dataset=mixture)
    attach(trainer)
    trainer.train()          # the logs hold bbu_loss, bbu_token_acc, bbu_tokens, bbu_share, ...

or `class MyTrainer(ChannelMetricsMixin, Trainer)`; `attach` gives an instance that same mixin.
Training is unchanged bit for bit: loss, gradients, random numbers, weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from channel_metrics.collator import ChannelCollator
from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.trainers.hf_batch import BatchChannels, take_channels
from channel_metrics.trainers.hf_data import declare_channels, wrap_collator
from channel_metrics.trainers.hf_live import LiveTable, wants_live_table
from channel_metrics.trainers.hf_loss import check_loss_hook, observe_loss
from channel_metrics.trainers.hf_state import TOTALS_FILE, ChannelState

__all__ = ["ChannelMetricsMixin", "attach", "check_trainer", "detach"]

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
)

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object

TrainerT = TypeVar("TrainerT", bound=transformers.Trainer)


def attach(trainer: TrainerT, config: MetricsConfig | None = None) -> TrainerT:
    """Give `trainer` channel metrics; the same object is returned.

    A second call only replaces the config. Raises `UnsupportedVersionError` if this
    transformers lacks a method that the metrics need.
    """
    check_trainer(type(trainer))
    if not isinstance(trainer, ChannelMetricsMixin):
        trainer.__class__ = _with_mixin(type(trainer))
    ChannelMetricsMixin.start_channel_metrics(trainer, config or MetricsConfig())
    return trainer


def detach(trainer: TrainerT) -> TrainerT:
    """Undo `attach`; the trainer is of its own class again."""
    original = getattr(type(trainer), "_channel_metrics_original", None)
    if original is not None:
        trainer.__class__ = original
    if hasattr(trainer, "channel_metrics"):
        del trainer.channel_metrics
    trainer.pop_callback(LiveTable)
    return trainer


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


class ChannelMetricsMixin(_Base):
    """Put before a Trainer class: `class MyTrainer(ChannelMetricsMixin, Trainer)`.

    channel_metrics: the config, as keyword of the constructor; None takes the defaults.
    """

    channel_metrics: ChannelState | None = None

    def __init__(
        self, *args: Any, channel_metrics: MetricsConfig | None = None, **kwargs: Any
    ) -> None:
        check_trainer(type(self))
        super().__init__(*args, **kwargs)
        self.start_channel_metrics(channel_metrics or MetricsConfig())

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        """Open the windows, for a trainer that has been made; a second call replaces them."""
        state = ChannelState(config)
        self.channel_metrics = state
        self.pop_callback(LiveTable)
        if config.live_table and wants_live_table(self):
            callbacks = self.callback_handler.callbacks
            self.add_callback(LiveTable(state.take_closed_window, callbacks))

    # ---- data: the collator learns the channels -------------------------------------------

    def get_train_dataloader(self) -> Any:
        with self._channel_collator(self.train_dataset, "train"):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        with self._channel_collator(dataset, "eval"):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._channel_collator(test_dataset, "test"):
            return super().get_test_dataloader(test_dataset)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if not isinstance(self.data_collator, ChannelCollator):
            return super()._remove_unused_columns(dataset, description=description)
        self._set_signature_columns_if_needed()
        before = self._signature_columns
        self._signature_columns = [*before, *self.data_collator.roots]
        try:
            return super()._remove_unused_columns(dataset, description=description)
        finally:
            self._signature_columns = before

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        remove = super()._get_collator_with_removed_columns
        if not isinstance(data_collator, ChannelCollator):
            return remove(data_collator, description=description)
        # Ours must be the outer one: it needs the columns that the other one removes.
        return data_collator.around(remove(data_collator.base, description=description))

    @contextmanager
    def _channel_collator(self, dataset: Any, description: str) -> Iterator[None]:
        state = self.channel_metrics
        if state is None or isinstance(self.data_collator, ChannelCollator):
            yield
            return
        fields, table = state.config.fields, state.table
        scanned = declare_channels(dataset, fields=fields, table=table, description=description)
        self._set_signature_columns_if_needed()
        before = self.data_collator
        self.data_collator = wrap_collator(
            before,
            fields=fields,
            table=table if scanned or state.config.channels else None,
            signature_columns=self._signature_columns,
            remove_unused_columns=self.args.remove_unused_columns,
        )
        try:
            yield
        finally:
            self.data_collator = before

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
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor):
            raise UnsupportedVersionError(
                f"channel metrics need `labels` in the batch, but {type(self).__name__} got "
                f"{', '.join(inputs)}; detach the metrics for this trainer."
            )
        with observe_loss(model, with_correct=state.with_correct) as observation:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        causal = None if state.captured is not None else self._is_causal()
        state.record(
            batch, labels, observation, causal=causal, num_real=self._num_real_sequences(batch)
        )
        return result

    def _num_real_sequences(self, batch: BatchChannels) -> int | None:
        """How many sequences of an evaluation batch are no repetitions; None means all.

        accelerate repeats the first samples so that all ranks get even batches, and drops the
        repetitions of the last step again when it gathers for metrics, by this same count. In
        training they are kept: the model is trained on them.
        """
        loader = self.accelerator.gradient_state
        evaluating = self.channel_metrics is not None and self.channel_metrics.evaluating
        if not evaluating or not loader.end_of_dataloader or loader.remainder <= 0:
            return None
        before = self.accelerator.process_index * batch.num_sequences
        return min(max(loader.remainder - before, 0), batch.num_sequences)

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
        state.close_evaluation(output.metrics, f"{called.arguments['metric_key_prefix']}_")
        return output


@cache
def _with_mixin(trainer_class: type) -> type:
    """The class with the mixin before it, under the same name: logs and cards show it."""
    body = {
        "__module__": trainer_class.__module__,
        "__qualname__": trainer_class.__qualname__,
        "__doc__": trainer_class.__doc__,
        "_channel_metrics_original": trainer_class,
    }
    return type(trainer_class.__name__, (ChannelMetricsMixin, trainer_class), body)
