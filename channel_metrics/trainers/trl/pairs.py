"""Channel metrics of preference pairs: what DPOTrainer and RewardTrainer have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ChannelError, ConfigError
from channel_metrics.trainers.hf.batch import BatchChannels, real_records, take_channels
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.trl.collator import RecordCollator
from channel_metrics.trainers.trl.state import SampleState

__all__ = ["PairChannelMetricsMixin"]


class PairChannelMetricsMixin(ChannelMetricsMixin):
    """One channel per pair; the batch stacks the chosen rows on the rejected ones."""

    def _observed_loss(
        self, compute: Any, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's own loss, with the values of each pair seen on the way."""
        state: Any = self.channel_metrics
        if not (model.training or state.evaluating):
            return compute(model, inputs, *args, **kwargs)
        # Tensor parallel ranks hold the same pairs; the first one counts them.
        if self._rank_layout().tp_rank != 0:
            return compute(model, inputs, *args, **kwargs)
        batch, state.pending = take_channels(inputs) or state.pending, None
        if batch is None:
            raise ChannelError(
                f"expected `channels` in the batch, but it holds {', '.join(inputs)}; this "
                "trainer builds its own data loader: wrap its collate_fn with "
                "channel_metrics.trainers.trl.collator.RecordCollator."
            )
        result, values = self.observe_pairs(
            compute, batch.num_sequences, model, inputs, *args, **kwargs
        )
        loss = (result[0] if isinstance(result, tuple) else result).detach()
        self._record(state, batch, values, loss)
        return result

    def observe_pairs(
        self,
        compute: Callable[..., Any],
        num_pairs: int,
        model: Any,
        inputs: Any,
        *rest: Any,
        **kw: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """What `compute` returned, and [num_pairs] values of each column."""
        raise NotImplementedError

    def _record(
        self, state: SampleState, batch: BatchChannels, values: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        window = state.window
        some = next(iter(values.values()))
        values = {"samples": torch.ones_like(some), **values}
        if "loss" in values and self.loss_is_mean_of_pairs():
            values = {**values, "loss_samples": torch.ones_like(some)}
            window.compare(values["loss"].double().mean(), loss.double())
        channels = batch.channels
        count = self._num_real_pairs(state, batch)
        window.add(channels[:count], {name: value[:count] for name, value in values.items()})

    def loss_is_mean_of_pairs(self) -> bool:
        """Whether the trainer's loss of a batch is nothing but the mean over its pairs."""
        return True

    def _num_real_pairs(self, state: SampleState, batch: BatchChannels) -> int:
        if not state.evaluating:
            return batch.num_sequences
        layout = self._rank_layout()
        found = real_records(self.accelerator, layout.data_rank, layout.data_size)
        return batch.num_sequences if found is None else min(found[0], batch.num_sequences)

    def _collator_kind(self, dataset: Any, description: str, known: bool) -> type[ChannelCollator]:
        if super()._collator_kind(dataset, description, known) is not ChannelCollator:
            raise ConfigError(
                "the batches of preference pairs are cut along the sequence (cp_size, sp_size), "
                "or sent by one process to the others (dispatch_batches): which pair a row "
                "belongs to would be lost. Set both off, or detach the metrics."
            )
        return RecordCollator
