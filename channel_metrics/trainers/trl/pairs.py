"""Channel metrics of pairs and single answers: the common part for DPO, KTO and reward models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from channel_metrics.data.batch_channels import BatchChannels
from channel_metrics.ranks.exchange import MISMATCH_TOLERANCE
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.trl.records import RecordsMixin

__all__ = ["PairChannelMetricsMixin", "agree"]


class PairChannelMetricsMixin(RecordsMixin):
    """For trainers whose loss and metrics come from `compute_loss`, as in newer TRL."""

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
        whole = partial(compute, model, inputs, *args, **kwargs)
        result, values = self.observe_pairs(whole, batch.num_sequences, model, inputs)
        loss = result[0] if isinstance(result, tuple) else result
        self._count_pairs(session, batch, values, loss.detach())
        return result

    def observe_pairs(
        self, compute: Callable[[], Any], num_pairs: int, model: Any, inputs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Call `compute`, TRL's loss of these inputs, and observe the pairs.

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
        ours = None
        if "loss" in values:
            ours = values["loss"].double().mean()
            loss = ours.where(agree(ours, loss, values["chosen"].dtype), loss.double())
        self._count_records(session, batch.channels, values, ours=ours, theirs=loss)


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether two losses are equal, up to the rounding of rewards of this dtype; bool, 0-d."""
    rounding = 16 * torch.finfo(dtype).eps
    relative = max(MISMATCH_TOLERANCE, rounding)
    return torch.isclose(ours.float(), theirs.float(), rtol=relative, atol=rounding, equal_nan=True)
