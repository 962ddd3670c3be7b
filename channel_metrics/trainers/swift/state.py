"""What an ms-swift trainer with channel metrics carries beyond what every HF trainer does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.keys import metric_key
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.sums import COLUMNS
from channel_metrics.errors import ConfigError
from channel_metrics.losses.cross_entropy import TokenLosses
from channel_metrics.trainers.hf.state import RESERVED_KEYS, ChannelState
from channel_metrics.trainers.swift.loss import SeenLosses

__all__ = ["OWN_RESERVED_KEYS", "SwiftReader", "SwiftState", "own_key", "own_losses"]

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


class SwiftReader(TokenLossReader):
    """Knows the losses that ms-swift computes per token, and how it weights them."""

    # Whether tokens are weighted with 1 where ms-swift does not weight them.
    always_weights = False
    # What is known of the micro-batch that is computed now.
    seen: SeenLosses | None = None
    loss_scale: Tensor | None = None

    def trainer_losses(self, labels: Tensor, *, per_token: bool) -> TokenLosses | None:
        """The token losses that ms-swift computed, None where it left the loss to the model."""
        return None if self.seen is None else self.seen.losses

    def weights(self, nll: Tensor, *, per_token: bool) -> Tensor | None:
        """What ms-swift multiplied each nll with; None where tokens are not weighted."""
        scale = factor = None
        if self.seen is not None and self.seen.losses is not None:
            scale, factor = self.loss_scale, self.seen.factor
        if scale is None and factor is None:
            return torch.ones_like(nll) if self.always_weights else None
        if scale is not None and not per_token:
            scale = torch.roll(scale, shifts=-1, dims=-1)
        weights = torch.ones_like(nll) if scale is None else scale.reshape(-1).to(nll)
        return weights if factor is None else weights * factor


@dataclass
class SwiftState(ChannelState):
    """Knows the names under which ms-swift logs the losses of channels."""

    reserved: ClassVar[frozenset[str]] = OWN_RESERVED_KEYS
    reader_class: ClassVar[type[TokenLossReader]] = SwiftReader
    # Whether `loss_<channel>` is logged, with ms-swift's own meaning.
    logs_own_names: bool = False
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
