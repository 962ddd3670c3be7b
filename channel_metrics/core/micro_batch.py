"""`MicroBatch`: what an adapter knows of the tokens of one micro-batch, when it counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["MicroBatch"]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The tokens of one micro-batch on this rank.

    The fields are those of `ChannelLossAccumulator.update`, and one more:

    sequences: where `channels` is one id per token, the channel of each sequence, int64 [N], for
        `samples`; on the one rank that counts the sequences, None on the others.
    """

    token_losses: Tensor
    channels: Tensor | Sequence[str | None]
    cu_seqlens: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    correct: Tensor | None = None
    weights: Tensor | None = None
    reported_sum: Tensor | None = None
    sequences: Tensor | None = None
