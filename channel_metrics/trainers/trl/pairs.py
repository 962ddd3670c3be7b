"""Channel metrics of pairs and single answers: the common part for DPO, KTO and reward models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.schema import Schema
from channel_metrics.data.batch_channels import BatchChannels
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ConfigError
from channel_metrics.ranks.exchange import MISMATCH_TOLERANCE
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.mixin import RESERVED_KEYS, ChannelMetricsMixin
from channel_metrics.trainers.trl.collator import RecordCollator

__all__ = ["PairChannelMetricsMixin", "agree"]


class PairChannelMetricsMixin(ChannelMetricsMixin):
    """One channel per pair, or per answer in KTO. In a batch of pairs, the rejected rows follow."""

    _schema: Schema
    _collator_name = "channel_metrics.trainers.trl.collator.RecordCollator"

    def _new_session(self, config: MetricsConfig) -> ChannelMetrics:
        return ChannelMetrics(
            config, reserved=RESERVED_KEYS, ranks=self._ranks(), schema=self._schema
        )

    def _observed_loss(
        self, compute: Any, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's own loss; the values of each pair are counted."""
        session = self.channel_metrics
        if session is None or not (model.training or session.evaluating):
            return compute(model, inputs, *args, **kwargs)
        # Tensor-parallel ranks hold the same pairs. The first rank counts them.
        if self._rank_layout().tp_rank != 0:
            return compute(model, inputs, *args, **kwargs)
        batch = self._taken_channels(inputs)
        result, values = self.observe_pairs(
            compute, batch.num_sequences, model, inputs, *args, **kwargs
        )
        loss = result[0] if isinstance(result, tuple) else result
        self._count_pairs(session, batch, values, loss.detach())
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
        """Compute TRL's loss and observe the pairs.

        Returns:
            The result of `compute`, and {column: values [num_pairs]}. `chosen` must be among the
            columns. A `loss` is compared to the one in the result.
        """
        raise NotImplementedError

    def _count_pairs(
        self,
        session: ChannelMetrics,
        batch: BatchChannels,
        values: Mapping[str, Tensor],
        loss: Tensor,
    ) -> None:
        rewards, ours = values["chosen"], None
        if "loss" in values:
            ours = values["loss"].double().mean()
            loss = ours.where(agree(ours, loss, rewards.dtype), loss.double())
        real = self._real_records(session)
        count = batch.num_sequences if real is None else min(real[0], batch.num_sequences)
        values = {"samples": torch.ones_like(rewards), **values}
        session.add(
            batch.channels[:count],
            {name: value[:count] for name, value in values.items()},
            ours=ours,
            theirs=loss,
        )

    def _collator_kind(self, dataset: Any, description: str, known: bool) -> type[ChannelCollator]:
        if super()._collator_kind(dataset, description, known) is not ChannelCollator:
            raise ConfigError(
                "the batches of preference pairs are cut along the sequence (cp_size, sp_size), "
                "or sent by one process to the others (dispatch_batches), so it is not known which "
                "pair a row belongs to; set both off, or detach the metrics."
            )
        return RecordCollator


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether two losses are equal, up to the rounding of rewards of this dtype; bool, 0-d."""
    rounding = 16 * torch.finfo(dtype).eps
    relative = max(MISMATCH_TOLERANCE, rounding)
    return torch.isclose(ours.float(), theirs.float(), rtol=relative, atol=rounding, equal_nan=True)
