"""`MicroBatch`: all that an adapter passes on to count the tokens of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.checks import (
    channels_shape,
    check_ids,
    check_layout,
    has_id_per_token,
)
from channel_metrics.core.places import Places, places
from channel_metrics.core.sums import TokenValues

__all__ = ["MicroBatch"]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The tokens of one micro-batch on this rank.

    The fields are the arguments of `ChannelLossAccumulator.update`, and some more.

    Attributes:
        sequences: int64 [N], the channel id of each sequence, if `channels` holds one id per
            token. It is needed to count `samples`. Only one of the ranks that share the sequences
            may give it; it is None on the others.
        places: where the tokens stand in their sequences, for the axes `position` and `length`.
            By default this follows from the boundaries, as if there was no padding and each loss
            stood at the position of its own token.
        marks: the labels of the tokens from columns of the records, int64 in the shape of
            token_losses, see `TokenAxes.columns`.
    """

    token_losses: Tensor
    channels: Tensor | Sequence[str | None]
    cu_seqlens: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    correct: Tensor | None = None
    weights: Tensor | None = None
    entropy: Tensor | None = None
    reported_sum: Tensor | None = None
    sequences: Tensor | None = None
    reference: Tensor | None = None
    places: Places | None = None
    marks: Tensor | None = None
    record_ids: Tensor | None = None

    @classmethod
    def of_values(
        cls,
        values: TokenValues,
        channels: Tensor | Sequence[str | None],
        cu_seqlens: Tensor | None,
        reported_sum: Tensor | None,
        reference: Tensor | None = None,
        *,
        record_ids: Tensor | None = None,
    ) -> MicroBatch:
        """Make one from the values that a `TokenLossReader` has read.

        Args:
            values: token losses, mask, correctness and weights.
            channels, cu_seqlens, reported_sum, reference, record_ids: as for
                `ChannelLossAccumulator.update`.
        """
        return cls(
            token_losses=values.losses,
            channels=channels,
            cu_seqlens=cu_seqlens,
            labels=values.targets,
            loss_mask=values.mask,
            correct=values.correct,
            weights=values.weights,
            entropy=values.entropy,
            reported_sum=reported_sum,
            reference=reference,
            places=values.places,
            marks=values.marks,
            record_ids=record_ids,
        )

    @property
    def of_tokens(self) -> Places | None:
        """`places`, or what follows from the boundaries; None if these do not show it."""
        if self.places is not None or self.per_token:
            return self.places
        check_layout(self.token_losses, channels_shape(self.channels), self.cu_seqlens)
        return places(self.token_losses.shape, self.cu_seqlens, None, self.token_losses)

    @property
    def per_token(self) -> bool:
        """Whether there is one channel per token, and not one per sequence."""
        shapes = self.token_losses.shape, channels_shape(self.channels)
        return has_id_per_token(*shapes, self.cu_seqlens, self.reference, self.record_ids)

    def add_to(self, table: ChannelLossAccumulator, groups: Sequence[Tensor] = ()) -> None:
        """Add the tokens to `table`, which moves to their device.

        Args:
            groups: as for `ChannelLossAccumulator.update`.

        Raises the errors of `ChannelLossAccumulator.update`.
        """
        device = self.token_losses.device
        if self.sequences is not None:
            check_ids(self.sequences, len(table.labels))
        table.to(device)
        channels = self.channels
        if isinstance(channels, Tensor):
            channels = channels.to(device, non_blocking=True)
        table.update(
            self.token_losses,
            channels=channels,
            cu_seqlens=self.cu_seqlens,
            labels=self.labels,
            loss_mask=self.loss_mask,
            correct=self.correct,
            weights=self.weights,
            entropy=self.entropy,
            reported_sum=self.reported_sum,
            reference=self.reference,
            record_ids=self.record_ids,
            groups=groups,
        )
        if self.sequences is not None:
            sequences = self.sequences.to(device, non_blocking=True)
            table.add(sequences, {"samples": torch.ones_like(sequences)})
