"""The mixin that gives ms-swift's Seq2SeqTrainer (`swift sft`, `swift pt`) channel metrics."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from channel_metrics.config import MetricsConfig
from channel_metrics.core.schema import TOKENS
from channel_metrics.data.batch_channels import BatchChannels
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.batch import Scratch
from channel_metrics.trainers.hf.mixin import RESERVED_KEYS
from channel_metrics.trainers.swift.collator import GROUP_KEY, SEGMENTS_KEY, SwiftCollator
from channel_metrics.trainers.swift.cut import ids_of_this_part, kept_bounds, kept_places
from channel_metrics.trainers.swift.data import ColumnMixin, wrapped_collator
from channel_metrics.trainers.swift.loss import (
    check_loss_functions,
    observe_token_losses,
    own_channel_loss_off,
)
from channel_metrics.trainers.swift.reader import SwiftReader
from channel_metrics.trainers.swift.schema import schema_with_own_loss

__all__ = ["OWN_RESERVED_KEYS", "SwiftChannelMetricsMixin"]

# Keys that ms-swift's trainers log themselves.
OWN_RESERVED_KEYS = RESERVED_KEYS | {
    f"{mode}{key}" for mode in ("", "eval_") for key in ("acc", "aux_loss", "seq_acc", "token_acc")
}


class SwiftChannelMetricsMixin(ColumnMixin):
    """Put before it: `class MyTrainer(SwiftChannelMetricsMixin, Seq2SeqTrainer)`."""

    # What Seq2SeqTrainer has.
    args: Any
    template: Any

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        """Open a session; raises `ConfigError` for keys that ms-swift logs itself."""
        check_loss_functions()
        super().start_channel_metrics(config)

    def _new_session(self, config: MetricsConfig) -> ChannelMetrics:
        schema = TOKENS
        if self.args.enable_channel_loss:
            with_own_loss = schema_with_own_loss(config.key_format)
            schema = with_own_loss if self._logs_own_loss() else schema
        return ChannelMetrics(
            config, reserved=OWN_RESERVED_KEYS, ranks=self._ranks(), schema=schema
        )

    def _logs_own_loss(self) -> bool:
        """Whether we log `loss_{channel}` in place of ms-swift."""
        # A loss of the user may need ms-swift's own channel loss.
        return self.args.enable_channel_loss and self.compute_loss_func is None

    def _new_scratch(self, session: ChannelMetrics) -> Scratch:
        return Scratch(
            SwiftReader(
                with_correct=session.with_correct,
                guard=session.guard,
                always_weights=self._logs_own_loss(),
            )
        )

    # ---- data -----------------------------------------------------------------------------

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        self._declare(session, dataset, description)
        return wrapped_collator(session, self.data_collator, SwiftCollator)

    def _prepare_inputs(self, inputs: Any) -> Any:
        # ms-swift cuts the labels here: to this rank's part of the rows, or to the supervised
        # tokens. The channels are cut in the same way.
        prepared = super()._prepare_inputs(inputs)
        for key in (GROUP_KEY, SEGMENTS_KEY):
            prepared.pop(key, None)
        session = self.channel_metrics
        if session is not None and session.measuring:
            scratch = self.channel_scratch
            with session.guard.guarded():
                if isinstance(scratch.pending, BatchChannels):
                    scratch.pending = self._cut_with_labels(session, scratch.pending, prepared)
        return prepared

    def _cut_with_labels(
        self, session: ChannelMetrics, batch: BatchChannels, inputs: Any
    ) -> BatchChannels:
        if self.template.sequence_parallel_size > 1:
            return BatchChannels(ids_of_this_part(session.labels, batch, inputs), None)
        kept = inputs.get("logits_to_keep")
        if kept is not None and session.token_axes:
            batch = replace(batch, places=kept_places(batch, kept, inputs))
        if kept is None or batch.cu_seqlens is None:
            return batch
        return replace(
            batch, cu_seqlens=kept_bounds(batch.cu_seqlens, kept, inputs["labels"].shape[-1])
        )

    # ---- loss -----------------------------------------------------------------------------

    def _observed_loss(
        self, compute: Any, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        reader: Any = self.channel_scratch.reader
        reader.loss_scale = inputs.get("loss_scale")
        with ExitStack() as stack:
            if reader.always_weights and "labels" in inputs:
                # With a loss_scale, ms-swift would not use Liger, whose token losses we can read.
                fused = self.args.use_liger_kernel
                inject = self.template.sequence_parallel_size == 1 and not fused
                stack.enter_context(own_channel_loss_off(self.args, inputs, inject=inject))
            reader.seen = stack.enter_context(
                observe_token_losses(
                    with_correct=reader.with_correct,
                    with_entropy=reader.with_entropy,
                    guard=reader.guard,
                )
            )
            try:
                return super()._observed_loss(compute, model, inputs, *args, **kwargs)
            finally:
                reader.seen = reader.loss_scale = None

    def _labels_of(self, batch: BatchChannels, inputs: Any) -> Any:
        # Under sequence parallelism, these labels are shifted already.
        return inputs.get("labels")

    def _is_causal(self) -> bool | None:
        return not self.template.is_encoder_decoder
