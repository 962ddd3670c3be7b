"""What a Trainer with channel metrics carries: tables, windows, and how one batch is recorded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from channel_metrics.capture.observation import Observation
from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.config import MetricsConfig
from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import metric_key
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.sums import TokenValues
from channel_metrics.core.totals import RunTotals
from channel_metrics.errors import ConfigError
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
    reader_class: ClassVar[type[TokenLossReader]] = TokenLossReader

    config: MetricsConfig
    # transformers may make a process group and yet train each process by itself.
    alone: bool = False
    evaluating: bool = False
    in_training_loop: bool = False
    pending: BatchChannels | None = None
    # Whether the context that the next loss is computed in cuts the rows.
    cut: bool = False
    warned: set[str] = field(default_factory=set)
    totals: RunTotals = field(default_factory=RunTotals)
    # The values of the window that the current log has closed, for those who show it.
    closed_window: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.guard = FaultGuard(self.config.on_error)
        self.reader = self.reader_class(with_correct=self.with_correct, guard=self.guard)
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
        values, reported = self.reader.read(
            observation,
            labels,
            causal=causal,
            by_rows=batch.cu_seqlens is None,
            per_token=batch.per_token,
        )
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
