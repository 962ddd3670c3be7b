"""What a Trainer with channel metrics carries: tables, windows, and how one batch is recorded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from channel_metrics.capture.transformers import (
    Observation,
    find_shift,
    mean_nll,
    shifted_labels,
    token_losses_from_outputs,
)
from channel_metrics.config import MetricsConfig
from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import metric_key
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.sums import TokenValues
from channel_metrics.core.totals import RunTotals
from channel_metrics.errors import ConfigError, UnsupportedVersionError
from channel_metrics.losses.cross_entropy import TokenLosses
from channel_metrics.ranks.sync import MISMATCH_TOLERANCE, sync
from channel_metrics.trainers.hf.batch import BatchChannels, first_records

__all__ = ["RESERVED_KEYS", "TOTALS_FILE", "ChannelState"]

logger = logging.getLogger("channel_metrics")

# Keys of transformers and TRL that a channel's key would overwrite.
RESERVED_KEYS = frozenset(
    {"train_loss", "eval_loss", "test_loss", "num_tokens", "mean_token_accuracy", "loss"}
)
TOTALS_FILE = "channel_metrics.json"


@dataclass
class ChannelState:
    """Windows of one trainer; `train` runs from log to log, `evaluation` per evaluation loop."""

    reserved: ClassVar[frozenset[str]] = RESERVED_KEYS

    config: MetricsConfig
    # transformers may make a process group and yet train each process by itself.
    alone: bool = False
    evaluating: bool = False
    in_training_loop: bool = False
    pending: BatchChannels | None = None
    # How the model's loss sees the labels; found out at the first batch.
    shifts: bool | None = None
    captured: bool | None = None
    # Ids per token stand beside labels that are shifted already.
    per_token: bool = False
    # Whether the context that the next loss is computed in cuts the rows.
    cut: bool = False
    warned: set[str] = field(default_factory=set)
    totals: RunTotals = field(default_factory=RunTotals)
    # The values of the window that the current log has closed, for those who show it.
    closed_window: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.guard = FaultGuard(self.config.on_error)
        self.table = self.config.new_table(self.reserved)
        metrics = self.config.window_metrics
        self.train = ChannelLossAccumulator(self.table, metrics=metrics)
        self.evaluation = ChannelLossAccumulator(self.table, metrics=metrics)

    @property
    def with_correct(self) -> bool:
        """Whether token accuracy is asked for."""
        return "token_acc" in self.config.metrics

    # ---- one micro-batch ------------------------------------------------------------------

    def record(
        self,
        batch: BatchChannels,
        labels: Tensor,
        observation: Observation,
        *,
        causal: bool | None,
        real: tuple[int, int] | None = None,
    ) -> None:
        """Add the tokens of one micro-batch to the open window.

        causal: whether the model predicts the next token, None if unknown. real: how many of
        how many records are no repetitions, see `real_records`; None means all.
        """
        self.per_token = batch.per_token
        by_rows = batch.cu_seqlens is None
        values, reported = self.token_values(labels, observation, causal=causal, by_rows=by_rows)
        if real is not None and real[0] < real[1]:
            batch, values = self._without_repetitions(batch, values, real)
            reported = None
        window = self.evaluation if self.evaluating else self.train
        if window.device != values.losses.device:
            window.to(values.losses.device)
        window.update(
            values.losses,
            channels=batch.channels,
            cu_seqlens=batch.cu_seqlens,
            loss_mask=values.mask,
            correct=values.correct,
            weights=values.weights,
            reported_sum=reported,
        )

    def token_values(
        self,
        labels: Tensor,
        observation: Observation,
        *,
        causal: bool | None,
        by_rows: bool = False,
    ) -> tuple[TokenValues, Tensor | None]:
        """The values of all positions of `labels`, and the sum that the model's loss is made of.

        That sum is None where the loss does not pass transformers' cross entropy. by_rows: every
        row is one sequence, so that a shift inside the rows would change no sum.
        """
        found = self._captured_losses(observation, labels)
        reported = None if found is None else found.reported_sum
        if found is None:
            found = self._fallback_losses(observation, labels, causal)
        weights = self._weights(found.nll)
        values = TokenValues(
            found.nll.view(labels.shape),
            (found.target != IGNORE_INDEX).view(labels.shape),
            None if found.correct is None else found.correct.view(labels.shape),
            None if weights is None else weights.view(labels.shape),
        )
        return (values.in_target_frame() if self.shifts and not by_rows else values), reported

    def _weights(self, nll: Tensor) -> Tensor | None:
        """The weight that the trainer gives to each nll, [T]; None where it gives none."""
        return None

    def _without_repetitions(
        self, batch: BatchChannels, values: TokenValues, real: tuple[int, int]
    ) -> tuple[BatchChannels, TokenValues]:
        kept = first_records(batch, values, *real)
        if kept is None:
            self.warn_once(
                f"the last evaluation batch repeats {real[1] - real[0]} of its {real[1]} records "
                f"so that all ranks get even batches, but it holds {batch.num_sequences} "
                "sequences: which of them are repeated cannot be told, so they are counted twice."
            )
        return kept or (batch, values)

    # ---- windows --------------------------------------------------------------------------

    def close_train(self, logs: dict[str, Any]) -> None:
        """Sum the train window over all ranks, write its metrics into `logs`, open the next."""
        total = self._close(self.train)
        self.totals.add(total)
        values = total.compute_by_channel()
        for channel, of_channel in values.items():
            of_run = self.totals.of(channel)
            of_channel.update({name: of_run[name] for name in self.config.run_metrics})
        self.closed_window = values
        self._write(values, logs, "")

    def close_evaluation(self, metrics: dict[str, Any], prefix: str) -> None:
        """The same for the evaluation window, for the channels that evaluation logs."""
        values = self._close(self.evaluation).compute_by_channel()
        chosen = self.config.eval_channels or tuple(values)
        # transformers' notebook takes the last `..._loss` for the loss of the whole set.
        own_loss = {key: metrics.pop(key) for key in (f"{prefix}loss",) if key in metrics}
        self._write({name: values[name] for name in values if name in chosen}, metrics, prefix)
        metrics.update(own_loss)

    def totals_now(self) -> RunTotals:
        """The totals with the open window, over all ranks; the window stays open."""
        return self.totals.copy().add(sync(self.train, alone=self.alone, guard=self.guard))

    def take_closed_window(self) -> dict[str, dict[str, float]]:
        """The values of the window that was closed since the last call; empty if none was."""
        values, self.closed_window = self.closed_window, {}
        return values

    def start_run(self, checkpoint: str | None) -> None:
        """Open the first window; totals go on from `checkpoint`, or start at zero."""
        self.train.reset()
        self.totals = RunTotals()
        if checkpoint is None:
            return
        path = Path(checkpoint) / TOTALS_FILE
        if path.exists():
            self.totals = RunTotals.load(path)
        else:
            logger.warning(
                "%s has no %s: it was written without channel metrics, so tokens_total and "
                "samples_total count from here.",
                checkpoint,
                TOTALS_FILE,
            )

    def _close(self, window: ChannelLossAccumulator) -> ChannelLossAccumulator:
        total = sync(window, alone=self.alone, guard=self.guard)
        window.reset()
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
        return total

    def _write(
        self, values: dict[str, dict[str, float]], taken: dict[str, Any], prefix: str
    ) -> None:
        added = {}
        for channel, of_channel in values.items():
            for metric, value in of_channel.items():
                key = prefix + metric_key(self.config.key_format, channel, metric)
                if key in taken:
                    raise ConfigError(
                        f"the metric key {key!r} is already logged by the trainer; choose "
                        "another key_format, or rename the channel."
                    )
                added[key] = value
        # All or nothing.
        taken.update(added)

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
            self.shifts = find_shift(candidates[0].target, labels, may_shift=not self.per_token)
            self.captured = True
        return candidates[0]

    def _fallback_losses(
        self, observation: Observation, labels: Tensor, causal: bool | None
    ) -> TokenLosses:
        if self.captured is None:
            self.shifts = not self.per_token and self._fallback_shift(observation, labels, causal)
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
            means = {shift: mean_nll(observation, labels, shift) for shift in (True, False)}
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
