"""The mixin that gives ms-swift's Seq2SeqTrainer (`swift sft`, `swift pt`) channel metrics."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from swift.trainers import Seq2SeqTrainer

from channel_metrics.config import MetricsConfig
from channel_metrics.data.collator import BOUNDS_KEY, declare_channels
from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.trainers.hf.batch import BatchChannels
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.hf.state import ChannelState
from channel_metrics.trainers.swift.collator import GROUP_KEY, SEGMENTS_KEY, SwiftCollator
from channel_metrics.trainers.swift.cut import ids_of_this_part, kept_bounds
from channel_metrics.trainers.swift.data import CHANNEL_COLUMN, records_of
from channel_metrics.trainers.swift.loss import (
    check_loss_functions,
    observe_token_losses,
    own_channel_loss_off,
)
from channel_metrics.trainers.swift.state import SwiftReader, SwiftState

__all__ = ["SwiftChannelMetricsMixin", "mixin_for"]


class SwiftChannelMetricsMixin(ChannelMetricsMixin):
    """Put before it: `class MyTrainer(SwiftChannelMetricsMixin, Seq2SeqTrainer)`."""

    state_class = SwiftState
    # What Seq2SeqTrainer has.
    args: Any
    template: Any

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        """Open the windows; raises `ConfigError` for keys that ms-swift logs itself."""
        check_loss_functions()
        super().start_channel_metrics(config)
        state: Any = self.channel_metrics
        # A loss of the user's may need what ms-swift computes for its own channel loss.
        state.logs_own_names = self.args.enable_channel_loss and self.compute_loss_func is None
        state.reader.always_weights = state.logs_own_names
        with state.guard.guarded():
            state.check_names()

    # ---- data -----------------------------------------------------------------------------

    def _with_channels(self, state: ChannelState, dataset: Any, description: str) -> Any:
        try:
            scanned = declare_channels(
                records_of(dataset),
                fields=(CHANNEL_COLUMN,),
                table=state.table,
                description=description,
            )
        except ChannelError as error:
            raise ChannelError(
                f"{error} ms-swift keeps the column {CHANNEL_COLUMN!r} of a dataset and drops "
                f"others; the patch ms_swift fills it from {', '.join(state.config.fields)}."
            ) from None
        known = scanned or bool(state.config.channels)
        return SwiftCollator(
            self.data_collator,
            table=state.table if known else None,
            strip=(),
            bounds_key=BOUNDS_KEY,
            row_bounds=False,
            guard=state.guard,
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        # ms-swift cuts the labels in here: to this rank's part of the rows, or to what is
        # supervised. The channels are cut in the same way.
        prepared = super()._prepare_inputs(inputs)
        for key in (GROUP_KEY, SEGMENTS_KEY):
            prepared.pop(key, None)
        state = self.channel_metrics
        if state is not None and state.pending is not None and state.guard.measuring:
            with state.guard.guarded():
                state.pending = self._cut_with_labels(state, state.pending, prepared)
        return prepared

    def _cut_with_labels(self, state: ChannelState, batch: BatchChannels, inputs: Any) -> Any:
        if self.template.sequence_parallel_size > 1:
            return BatchChannels(ids_of_this_part(state, batch, inputs), None)
        kept = inputs.get("logits_to_keep")
        if kept is None or batch.cu_seqlens is None:
            return batch
        return replace(
            batch, cu_seqlens=kept_bounds(batch.cu_seqlens, kept, inputs["labels"].shape[-1])
        )

    # ---- loss -----------------------------------------------------------------------------

    def _observed_loss(
        self, compute: Any, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        state: Any = self.channel_metrics
        reader: SwiftReader = state.reader
        reader.loss_scale = inputs.get("loss_scale")
        with ExitStack() as stack:
            if state.logs_own_names and "labels" in inputs:
                # Weights would keep the loss from Liger, which has the token losses as well.
                fused = self.args.use_liger_kernel
                inject = self.template.sequence_parallel_size == 1 and not fused
                stack.enter_context(own_channel_loss_off(self.args, inputs, inject=inject))
            reader.seen = stack.enter_context(
                observe_token_losses(with_correct=state.with_correct, guard=state.guard)
            )
            try:
                return super()._observed_loss(compute, model, inputs, *args, **kwargs)
            finally:
                reader.seen = reader.loss_scale = None

    def _labels_of(self, batch: BatchChannels, inputs: Any) -> Any:
        # Under sequence parallelism they are shifted already.
        return inputs.get("labels")

    def _is_causal(self) -> bool | None:
        return not self.template.is_encoder_decoder


def mixin_for(trainer_class: type) -> type[SwiftChannelMetricsMixin]:
    """The mixin for a trainer of ms-swift; raises `UnsupportedVersionError` for other tasks."""
    if not issubclass(trainer_class, Seq2SeqTrainer):
        raise UnsupportedVersionError(
            f"channel metrics are for ms-swift's Seq2SeqTrainer (swift sft, swift pt), but this is "
            f"a {trainer_class.__name__}; leave the metrics out for this task."
        )
    return SwiftChannelMetricsMixin
