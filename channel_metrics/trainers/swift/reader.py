"""The token losses and weights of a micro-batch in ms-swift's trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.core.faults import FaultGuard
from channel_metrics.losses.cross_entropy import TokenLosses
from channel_metrics.trainers.swift.loss import SeenLosses

__all__ = ["SwiftReader"]


class SwiftReader(TokenLossReader):
    """Reads the losses that ms-swift computes per token, and its weights.

    Args:
        with_correct, guard: as in `TokenLossReader`.
        always_weights: whether tokens get weight 1 if ms-swift weights none.

    Attributes:
        seen, loss_scale: the observed losses and the `loss_scale` of the current micro-batch.
    """

    def __init__(self, *, with_correct: bool, guard: FaultGuard, always_weights: bool) -> None:
        super().__init__(with_correct=with_correct, guard=guard)
        self.always_weights = always_weights
        self.seen: SeenLosses | None = None
        self.loss_scale: Tensor | None = None

    def trainer_losses(self, labels: Tensor, *, per_token: bool) -> TokenLosses | None:
        """The token losses that ms-swift computed; None if the model computed the loss."""
        return None if self.seen is None else self.seen.losses

    def weights(self, nll: Tensor, *, per_token: bool) -> Tensor | None:
        """The factor of each nll in ms-swift's loss; None if tokens are not weighted."""
        scale = factor = None
        if self.seen is not None and self.seen.losses is not None:
            scale, factor = self.loss_scale, self.seen.factor
        if scale is None and factor is None:
            return torch.ones_like(nll) if self.always_weights else None
        if scale is not None and not per_token:
            scale = torch.roll(scale, shifts=-1, dims=-1)
        weights = torch.ones_like(nll) if scale is None else scale.reshape(-1).to(nll)
        return weights if factor is None else weights * factor
