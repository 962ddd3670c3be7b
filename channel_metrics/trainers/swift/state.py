"""What an ms-swift trainer with channel metrics carries beyond what every HF trainer does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from channel_metrics.capture.transformers import Observation
from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.keys import metric_key
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.sums import COLUMNS
from channel_metrics.errors import ConfigError
from channel_metrics.losses.cross_entropy import TokenLosses
from channel_metrics.trainers.hf.state import RESERVED_KEYS, ChannelState
from channel_metrics.trainers.swift.loss import SeenLosses

__all__ = ["OWN_RESERVED_KEYS", "SwiftState", "own_key", "own_losses"]

# Keys that ms-swift's trainers log themselves.
OWN_RESERVED_KEYS = RESERVED_KEYS | {
    f"{mode}{key}" for mode in ("", "eval_") for key in ("acc", "aux_loss", "seq_acc", "token_acc")
}
_TOKENS, _NONFINITE, _WEIGHTED = (COLUMNS.index(n) for n in ("tokens", "nonfinite", "weighted_nll"))


def own_key(channel: str) -> str:
    """The name under which ms-swift logs a channel: it calls samples without one `None`."""
    return f"loss_{None if channel == UNLABELED else channel}"


def own_losses(total: ChannelLossAccumulator) -> dict[str, float]:
    """{channel: loss as ms-swift defines it}: what it optimises, over the number of tokens."""
    rows = zip((UNLABELED, *total.table.names), total.sums().tolist(), strict=True)
    finite = {name: (row[_WEIGHTED], row[_TOKENS] - row[_NONFINITE]) for name, row in rows}
    return {name: loss / count for name, (loss, count) in finite.items() if count}


@dataclass
class SwiftState(ChannelState):
    """Knows the losses that ms-swift computes per token, and the names under which it logs them."""

    reserved: ClassVar[frozenset[str]] = OWN_RESERVED_KEYS
    # Whether `loss_<channel>` is logged, with ms-swift's own meaning.
    logs_own_names: bool = False
    # What is known of the micro-batch that is computed now.
    seen: SeenLosses | None = None
    loss_scale: Tensor | None = None
    _own: dict[str, float] = field(default_factory=dict)

    def check_names(self) -> None:
        """Raise `ConfigError` if a key of ours would also be one of ms-swift's."""
        probe = "channel"
        keys = {metric_key(self.config.key_format, probe, name) for name in self.config.metrics}
        if self.logs_own_names and own_key(probe) in keys:
            raise ConfigError(
                f"key_format {self.config.key_format!r} gives the keys loss_<channel>, which "
                "--enable_channel_loss logs with another meaning; choose another key_format, or "
                "leave --enable_channel_loss out."
            )

    def _captured_losses(self, observation: Observation, labels: Tensor) -> TokenLosses | None:
        if self.seen is None or self.seen.losses is None:
            return super()._captured_losses(observation, labels)
        self.captured, self.shifts = True, not self.per_token
        return self.seen.losses

    def _weights(self, nll: Tensor) -> Tensor | None:
        """What ms-swift multiplied each nll with; None where tokens are not weighted."""
        seen = self.seen
        if seen is None or seen.losses is None:
            return torch.ones_like(nll) if self.logs_own_names else None
        scale = self.loss_scale
        if scale is not None and not self.per_token:
            scale = torch.roll(scale, shifts=-1, dims=-1)
        if scale is None and seen.factor is None:
            return torch.ones_like(nll) if self.logs_own_names else None
        weights = torch.ones_like(nll) if scale is None else scale.reshape(-1).to(nll)
        return weights if seen.factor is None else weights * seen.factor

    def _close(self, window: ChannelLossAccumulator) -> ChannelLossAccumulator:
        total = super()._close(window)
        self._own = own_losses(total) if self.logs_own_names else {}
        return total

    def _write(
        self, values: dict[str, dict[str, float]], taken: dict[str, Any], prefix: str
    ) -> None:
        own = {prefix + own_key(name): loss for name, loss in self._own.items()}
        super()._write(values, taken, prefix)
        taken.update(own)
