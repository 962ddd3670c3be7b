"""The mixin that gives a transformers Trainer channel metrics. It counts the micro-batches."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

import torch
import transformers
from torch import Tensor

from channel_metrics.capture.observation import Observation
from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.capture.transformers import check_loss_hook, is_causal
from channel_metrics.config import MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.sums import TokenValues
from channel_metrics.data.batch_channels import BatchChannels, take_channels
from channel_metrics.data.collator_fault import CollatorFault
from channel_metrics.data.repeats import first_records, real_records
from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.observers.live_table import LiveTable, wants_live_table
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.batch import Scratch, has_token_labels, labels_of
from channel_metrics.trainers.hf.data import check_columns
from channel_metrics.trainers.hf.own_loss import warn_of_own_loss
from channel_metrics.trainers.hf.parallel import shard_with_labels
from channel_metrics.trainers.hf.windows import ChannelWindowsMixin

logger = logging.getLogger("channel_metrics")

__all__ = ["RESERVED_KEYS", "ChannelMetricsMixin", "check_trainer"]

# Keys of transformers and TRL that a channel's key would overwrite.
RESERVED_KEYS = frozenset(
    {"train_loss", "eval_loss", "test_loss", "num_tokens", "mean_token_accuracy", "loss"}
)

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
    "training_step",
)


class ChannelMetricsMixin(ChannelWindowsMixin):
    """Put before a Trainer class: `class MyTrainer(ChannelMetricsMixin, Trainer)`.

    Args:
        channel_metrics: the config; None means the default config. The attribute of this name is
            the session of the trainer, a `ChannelMetrics`.
    """

    # What an error message recommends to a trainer that makes its own data loader.
    _collator_name = "channel_metrics.ChannelCollator"

    def __init__(
        self, *args: Any, channel_metrics: MetricsConfig | None = None, **kwargs: Any
    ) -> None:
        check_trainer(type(self))
        super().__init__(*args, **kwargs)
        self.start_channel_metrics(channel_metrics or MetricsConfig())

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        """Open a session with the settings in `config`. A second call opens a new one."""
        # Loaders that are kept for persistent workers have the collator of an old session.
        vars(self).pop("_eval_dataloaders", None)
        session = self._new_session(config)
        session.ends_run = True
        session.read_tokenizer(getattr(self, "processing_class", None), self.model)
        self.channel_metrics, self.channel_scratch = session, self._new_scratch(session)
        self.channel_scratch.reader.with_entropy = session.with_entropy
        session.gradients.watch(self.model)
        self.pop_callback(LiveTable)
        if config.live_table and wants_live_table(self):
            table = LiveTable(self.callback_handler.callbacks)
            session.on_window.append(table)
            self.add_callback(table)

    def _new_session(self, config: MetricsConfig) -> ChannelMetrics:
        return ChannelMetrics(config, reserved=RESERVED_KEYS, ranks=self._ranks())

    def _ranks(self) -> Ranks:
        # transformers may make a process group although each process trains a model of its own.
        return Ranks(alone=self.accelerator.num_processes == 1)

    def _new_scratch(self, session: ChannelMetrics) -> Scratch:
        reader = TokenLossReader(with_correct=session.with_correct, guard=session.guard)
        return Scratch(reader)

    def _shielded(self, original: Any, observing: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `original`, observed if the metrics are on; see `FaultGuard.shielded`."""
        if self.channel_metrics is None:
            return original(*args, **kwargs)
        return self.channel_metrics.guard.shielded(original, observing, *args, **kwargs)

    # ---- one micro-batch ------------------------------------------------------------------

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        if self.channel_metrics is not None and self._holds_our_keys(prepared):
            # Even if the metrics are off, the model must not see our keys.
            self.channel_scratch.pending = take_channels(prepared)
        return prepared

    def _holds_our_keys(self, inputs: Any) -> bool:
        """False for a batch without our keys; a `channels` in it belongs to the script."""
        if not isinstance(inputs, MutableMapping):
            return False
        if not self.channel_whole_script or isinstance(inputs.get("channels"), CollatorFault):
            return True
        return not self._counts_tokens() or has_token_labels(inputs)

    def _counts_tokens(self) -> bool:
        session = self.channel_metrics
        return session is not None and session.schema.unit == "tokens"

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return self._shielded(super().compute_loss, self._observed_loss, *args, **kwargs)

    def _observed_loss(
        self, compute: Any, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Call `compute`, and count the tokens of its batch."""
        session, scratch = self.channel_metrics, self.channel_scratch
        if session is None or not (model.training or session.evaluating):
            return compute(model, inputs, *args, **kwargs)
        if not has_token_labels(inputs):
            if self.channel_whole_script:
                self._leave_alone(session)
                return compute(model, inputs, *args, **kwargs)
            if "labels" in inputs:
                raise self._no_token_labels(inputs)
        batch = self._taken_channels(inputs)
        if not session.evaluating:
            check_columns(session, scratch, batch)
        if not self._rank_layout().counts(cut=scratch.cut):
            return compute(model, inputs, *args, **kwargs)
        labels = self._labels_of(batch, inputs)
        if not isinstance(labels, Tensor):
            raise self._no_token_labels(inputs)
        with scratch.reader.observe(model) as observation:
            result = compute(model, inputs, *args, **kwargs)
        values = self._count_tokens(session, batch, labels, observation)
        warn_of_own_loss(self, result, observation, values, kwargs.get("num_items_in_batch"))
        return result

    def _no_token_labels(self, inputs: Any) -> UnsupportedVersionError:
        given = ", ".join(
            f"{key} {value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else str(key)
            for key, value in inputs.items()
        )
        return UnsupportedVersionError(
            "channel metrics need `labels` in the batch, one for each token, but "
            f"{type(self).__name__} got {given}; detach the metrics for this trainer."
        )

    def _leave_alone(self, session: ChannelMetrics) -> None:
        """End the metrics of a trainer that has no labels of tokens."""
        logger.info("channel metrics: %s has no labels of tokens, left alone", type(self).__name__)
        session.guard.error = UnsupportedVersionError("no labels of tokens")
        # The next log finds metrics that have ended; that must not end the run.
        session.guard.on_error = "warn"
        self.channel_scratch.pending = None

    def _taken_channels(self, inputs: Any) -> BatchChannels:
        """Take the channels of the current batch. This can be done only once per batch."""
        scratch = self.channel_scratch
        batch, scratch.pending = take_channels(inputs) or scratch.pending, None
        if isinstance(batch, CollatorFault):
            raise batch.error
        if batch is None:
            raise ChannelError(
                "expected `channels` in the batch, but it holds "
                f"{', '.join(inputs)}; this trainer builds its own data loader: wrap its "
                f"collate_fn with {self._collator_name}."
            )
        return batch

    def _labels_of(self, batch: BatchChannels, inputs: Any) -> Any:
        """The labels in the layout of the channels."""
        return labels_of(batch, inputs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._shielded(super().prediction_step, self._observed_step, *args, **kwargs)

    def _observed_step(self, step: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `step`, and count the batch if the step did not call `compute_loss`. Steps that
        generate, and those of some subclasses, call the model themselves."""
        session, scratch = self.channel_metrics, self.channel_scratch
        if session is None or not session.evaluating or not self._counts_tokens():
            return step(model, inputs, *args, **kwargs)
        with scratch.reader.observe(model) as observation:
            result = step(model, inputs, *args, **kwargs)
        labels = self._prepare_input(inputs.get("labels"))
        if scratch.pending is not None and isinstance(labels, Tensor):
            self._count_tokens(session, self._taken_channels({}), labels, observation)
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._shielded(super().training_step, self._checked_step, *args, **kwargs)

    def _checked_step(self, step: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if self._counts_tokens() and self.channel_scratch.pending is not None:
            raise UnsupportedVersionError(
                f"{type(self).__name__}.training_step calls the model itself: its batch had "
                "channels, but `compute_loss` was not called, so no tokens were counted. Put what "
                "it changes into `compute_loss`, or detach the metrics."
            )
        return result

    def _count_tokens(
        self,
        session: ChannelMetrics,
        batch: BatchChannels,
        labels: Tensor,
        observation: Observation,
    ) -> TokenValues:
        """Count the tokens of a batch. Returns the values of all of them."""
        reader = self.channel_scratch.reader
        values, reported = reader.read(
            observation,
            labels,
            causal=None if reader.captured is not None else self._is_causal(),
            by_rows=batch.cu_seqlens is None and not session.token_axes,
            per_token=batch.per_token,
            with_targets=session.with_targets,
        )
        of_all, values = values, batch.with_places(values) if session.token_axes else values
        real = self._real_records(session)
        if real is not None and real[0] < real[1]:
            reported = None
            kept = self._first_records(batch, values, *real)
            if kept is None:
                session.warn_once(
                    f"the last evaluation batch repeats {real[1] - real[0]} of its {real[1]} "
                    "records so that all ranks get even batches, but it holds "
                    f"{batch.num_sequences} sequences: which of them are repeated cannot be "
                    "told, so they are counted twice."
                )
            batch, values = kept or (batch, values)
        of_batch = batch.channels, batch.cu_seqlens, reported, batch.reference
        session.count(MicroBatch.of_values(values, *of_batch, record_ids=batch.record_ids))
        return of_all

    def _real_records(self, session: ChannelMetrics) -> tuple[int, int] | None:
        """(records without repetitions, all records) of the batch; None if nothing is repeated."""
        if not session.evaluating:
            return None
        layout = self._rank_layout()
        return real_records(self.accelerator, layout.data_rank, layout.data_size)

    def _first_records(
        self, batch: BatchChannels, values: TokenValues, count: int, per_rank: int
    ) -> tuple[BatchChannels, TokenValues] | None:
        return first_records(batch, values, count, per_rank)

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> Any:
        context, prepared = super()._prepare_context_parallel_inputs(model, inputs)
        session = self.channel_metrics
        if session is not None and session.measuring:
            scratch = self.channel_scratch
            with session.guard.guarded():
                # In an evaluation, the channels are no longer in the batch.
                taken = take_channels(dict(prepared)) or scratch.pending
                found = (taken.channels, taken.marks) if isinstance(taken, BatchChannels) else ()
                cut = shard_with_labels(context, *found)
                scratch.cut, context = cut is not context, cut
        return context, prepared

    def _is_causal(self) -> bool | None:
        """Whether a model of this kind predicts the next token; None if this is not known."""
        return is_causal(self.accelerator.unwrap_model(self.model))


def check_trainer(trainer_class: type) -> None:
    """Raise `UnsupportedVersionError` if `trainer_class` lacks a method that we extend."""
    check_loss_hook()
    missing = [name for name in _HOOKS if not hasattr(trainer_class, name)]
    if missing:
        raise UnsupportedVersionError(
            f"channel metrics extend {len(_HOOKS)} methods of the Trainer, but "
            f"{trainer_class.__name__} of transformers {transformers.__version__} lacks "
            f"{', '.join(missing)}; use a tested version (docs/compatibility.md)."
        )
