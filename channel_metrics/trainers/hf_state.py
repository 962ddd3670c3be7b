"""What a Trainer with channel metrics carries: tables, windows, and how one batch is recorded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from channel_metrics.accumulator import ChannelLossAccumulator
from channel_metrics.channels import UNLABELED
from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ChannelMetricsError, ConfigError, UnsupportedVersionError
from channel_metrics.losses import TokenLosses
from channel_metrics.statistics import TokenValues
from channel_metrics.sync import MISMATCH_TOLERANCE, sync
from channel_metrics.trainers.hf_loss import (
    Observation,
    shifted_labels,
    token_losses_from_outputs,
)

__all__ = ["RESERVED_KEYS", "BatchChannels", "ChannelState"]

logger = logging.getLogger("channel_metrics")

# Keys of transformers and TRL that a channel's key would overwrite.
RESERVED_KEYS = frozenset(
    {"train_loss", "eval_loss", "test_loss", "num_tokens", "mean_token_accuracy", "loss"}
)


@dataclass(frozen=True)
class BatchChannels:
    """The part of a batch that is ours: channels per sequence, and boundaries if not rows."""

    channels: Tensor | list[str | None]
    cu_seqlens: Tensor | None


@dataclass
class ChannelState:
    """Windows of one trainer; `train` runs from log to log, `evaluation` per evaluation loop."""

    config: MetricsConfig
    evaluating: bool = False
    in_training_loop: bool = False
    pending: BatchChannels | None = None
    # How the model's loss sees the labels; found out at the first batch.
    shifts: bool | None = None
    captured: bool | None = None
    warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.table = self.config.new_table(RESERVED_KEYS)
        self.train = ChannelLossAccumulator(self.table, metrics=self.config.metrics)
        self.evaluation = ChannelLossAccumulator(self.table, metrics=self.config.metrics)

    @property
    def with_correct(self) -> bool:
        return "token_acc" in self.config.metrics

    def record(
        self, batch: BatchChannels, labels: Tensor, observation: Observation, causal: bool | None
    ) -> None:
        """Add the tokens of one micro-batch to the open window."""
        found = self._captured_losses(observation, labels)
        reported: Tensor | None
        if found is not None:
            reported = found.reported_sum
        else:
            found, reported = self._fallback_losses(observation, labels, causal), None
        values = TokenValues(
            found.nll.view(labels.shape),
            (found.target != -100).view(labels.shape),
            None if found.correct is None else found.correct.view(labels.shape),
        )
        if self.shifts:
            values = values.in_target_frame()
        window = self.evaluation if self.evaluating else self.train
        if window.device != values.losses.device:
            window.to(values.losses.device)
        window.update(
            values.losses,
            channels=batch.channels,
            cu_seqlens=batch.cu_seqlens,
            loss_mask=values.mask,
            correct=values.correct,
            reported_sum=reported,
        )

    def close(self, window: ChannelLossAccumulator, taken: dict[str, Any], prefix: str = "") -> None:
        """Sum `window` over all ranks, write its metrics into `taken`, and open the next one."""
        total = sync(window)
        window.reset()
        for key, value in total.compute().items():
            if prefix + key in taken:
                raise ConfigError(
                    f"the metric key {prefix + key!r} is already logged by the trainer; choose "
                    "another key_format, or rename the channel."
                )
            taken[prefix + key] = value
        mismatch = total.mismatch()
        if mismatch > MISMATCH_TOLERANCE:
            self.warn_once(
                "the channels of a window add up to a loss that differs from the trainer's own "
                f"by {mismatch:.1e} (relative); please report this with your model and trainer."
            )
        if not total.table.names and UNLABELED in total.compute_by_channel():
            self.warn_once(
                "no record of this window had a channel (looked for "
                f"{', '.join(self.config.fields)}); all tokens count as 'unlabeled'."
            )

    def warn_once(self, message: str) -> None:
        """Log a warning the first time it comes up."""
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)

    def _captured_losses(self, observation: Observation, labels: Tensor) -> TokenLosses | None:
        candidates = observation.matching(labels.numel())
        if len(candidates) > 1:
            raise UnsupportedVersionError(
                f"the model computed {len(candidates)} cross entropies over all labels in one "
                "step; which of them is its language model loss cannot be told. Detach the "
                "metrics for this model."
            )
        if not candidates:
            return None
        if not self.captured:
            self.shifts = _find_shift(candidates[0].target, labels)
            self.captured = True
        return candidates[0]

    def _fallback_losses(
        self, observation: Observation, labels: Tensor, causal: bool | None
    ) -> TokenLosses:
        if self.captured is None:
            self.shifts = self._fallback_shift(observation, labels, causal)
            logger.info(
                "the loss does not pass transformers' cross entropy: token losses are measured "
                "on the logits, with a second softmax."
            )
        self.captured = False
        targets = shifted_labels(labels) if self.shifts else labels
        return token_losses_from_outputs(observation, targets)

    def _fallback_shift(
        self, observation: Observation, labels: Tensor, causal: bool | None
    ) -> bool:
        """Whether the labels are shifted: by the model's kind, checked against its own loss."""
        model_loss = observation.loss()
        if model_loss is not None:
            reported = float(model_loss.detach())
            means = {shift: _mean_nll(observation, labels, shift) for shift in (True, False)}
            off = {shift: abs(mean - reported) / abs(reported) for shift, mean in means.items()}
            near = min(off, key=off.__getitem__)
            # A loss in bfloat16 has three digits; the other way is clearly worse or unknown.
            if off[near] < 1e-2 and off[near] * 10 < off[not near]:
                return near
            if causal is not None and off[causal] >= 1e-2:
                self.warn_once(
                    f"the model's own loss ({reported:.4f}) is not the mean cross entropy of its "
                    f"logits ({means[causal]:.4f}): it adds or weights something. Channel losses "
                    f"are the plain cross entropy, labels {'shifted' if causal else 'as they are'}."
                )
        if causal is None:
            raise UnsupportedVersionError(
                "whether the loss of this model shifts its labels cannot be told: its class is "
                "none of transformers' language models, and its loss is not the mean cross "
                "entropy of its logits, shifted or not. Detach the metrics for this model."
            )
        return causal


def _mean_nll(observation: Observation, labels: Tensor, shift: bool) -> float:
    targets = shifted_labels(labels) if shift else labels
    total = token_losses_from_outputs(observation, targets).reported_sum
    return float(total / (targets != -100).sum().clamp(min=1))


def _find_shift(target: Tensor, labels: Tensor) -> bool:
    """Whether the loss saw shifted labels; one look at the first batch."""
    flat = target.to(labels.device)
    if torch.equal(flat, shifted_labels(labels).reshape(-1)):
        return True
    if torch.equal(flat, labels.reshape(-1)):
        return False
    raise ChannelMetricsError(
        "the model's loss must see the labels of the batch, shifted by one or as they are, but "
        f"it saw others (shape {list(labels.shape)}, "
        f"{int((flat != -100).sum())} supervised against {int((labels != -100).sum())} in the "
        "batch); tokens cannot be matched to their channels. Detach the metrics for this model."
    )
