"""What a Megatron trainer of ms-swift with channel metrics carries: names, windows, totals."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import metric_key
from channel_metrics.core.metrics import ALL_METRICS
from channel_metrics.core.totals import RunTotals
from channel_metrics.errors import ConfigError
from channel_metrics.trainers.hf.data import declare_channels
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.megatron.run import TOTALS_FILE
from channel_metrics.trainers.swift.data import CHANNEL_COLUMN, records_of
from channel_metrics.trainers.swift.state import own_key, own_losses

__all__ = ["MEGATRON_RESERVED_KEYS", "SwiftMegatronMetrics", "SwiftMegatronState"]

# Keys that ms-swift's Megatron trainers log themselves.
MEGATRON_RESERVED_KEYS = frozenset(
    {"eval_loss", "global_load_balancing_loss", "indexer_loss", "load_balancing_loss", "loss"}
    | {"seq_load_balancing_loss", "z_loss"}
    | {f"mtp_{depth}_loss" for depth in range(1, 9)}
)


class SwiftMegatronMetrics(MegatronChannelMetrics):
    """One window; with ms-swift's own values beside ours where the user asked for them.

    own_names: whether `loss_{channel}` is logged with ms-swift's own meaning. only: the channels
    that are logged, empty for all.
    """

    own_names: bool = False
    only: tuple[str, ...] = ()

    def _values(self, summed: ChannelLossAccumulator, totals: RunTotals) -> dict[str, float]:
        values = super()._values(summed, totals)
        for name in summed.table.names if self.only else ():
            for metric in (*ALL_METRICS, "nonfinite") if name not in self.only else ():
                values.pop(metric_key(self.config.key_format, name, metric), None)
        if self.own_names:
            values.update({own_key(name): loss for name, loss in own_losses(summed).items()})
        return values


class SwiftMegatronState:
    """The channels of one trainer; `train` runs from log to log, `evaluation` per evaluation.

    Raises `ConfigError` for keys that ms-swift logs itself.
    """

    def __init__(self, config: MetricsConfig, args: Any) -> None:
        self.config = config
        self.args = args
        self.guard = FaultGuard(config.on_error)
        self.table = config.new_table(MEGATRON_RESERVED_KEYS)
        self.logs_own_names: bool = args.enable_channel_loss
        self.evaluating = False
        of_window = replace(config, metrics=config.window_metrics)
        self.train = SwiftMegatronMetrics(self.table, config=config, guard=self.guard)
        self.evaluation = SwiftMegatronMetrics(self.table, config=of_window, guard=self.guard)
        self.evaluation.only = config.eval_channels
        self.train.own_names = self.evaluation.own_names = self.logs_own_names
        if self.logs_own_names:
            _check_own_names(config)

    @property
    def window(self) -> SwiftMegatronMetrics:
        """The window that tokens are counted in now."""
        return self.evaluation if self.evaluating else self.train

    def declare(self, datasets: dict[str, Any]) -> None:
        """Learn the channels of {"train": ..., "eval": ...}, where they can be read beforehand."""
        for description, dataset in datasets.items():
            if dataset is not None:
                declare_channels(
                    records_of(dataset),
                    fields=(CHANNEL_COLUMN,),
                    table=self.table,
                    description=description,
                )

    def weights(self, losses: Tensor, loss_scale: Tensor | None) -> Tensor | None:
        """What ms-swift multiplies each nll [B, S] with; None where nobody wants to know."""
        dft = self.args.enable_dft_loss
        if not dft and loss_scale is None and not self.logs_own_names:
            return None
        nll = losses.detach().float()
        weights = torch.exp(-nll) if dft else torch.ones_like(nll)
        return weights if loss_scale is None else weights * loss_scale

    def warn_of_crossings(self, count: int) -> None:
        """Say so, once, if targets belong to another sequence than what predicts them."""
        if count and not self.train.has_warned_of_crossings:
            self.train.has_warned_of_crossings = True
            warnings.warn(
                f"{count} supervised targets of this micro-batch are the first token of the next "
                "sequence of their pack; they count for the channel of that sequence. ms-swift's "
                "own templates mask them.",
                stacklevel=2,
            )

    def save(self, folder: Path, *, is_writer: bool) -> None:
        """Write the totals into the folder of a checkpoint; a collective."""
        totals = self.train.totals_now()
        if is_writer and self.guard.measuring:
            totals.save(folder / TOTALS_FILE)

    def resume(self, folder: Path) -> None:
        """Go on with the totals of a checkpoint; warn and start at zero if it has none."""
        path = folder / TOTALS_FILE
        if path.exists():
            self.train.totals = RunTotals.load(path)
            return
        warnings.warn(
            f"the checkpoint {folder} has no {TOTALS_FILE}: it was written without channel "
            "metrics. tokens_total and samples_total start at zero.",
            stacklevel=2,
        )


def _check_own_names(config: MetricsConfig) -> None:
    probe = "channel"
    # ms-swift's writers turn the slash into an underscore.
    keys = {metric_key(config.key_format, probe, name).replace("/", "_") for name in config.metrics}
    if own_key(probe) in keys:
        raise ConfigError(
            f"key_format {config.key_format!r} gives the keys loss_<channel>, which "
            "--enable_channel_loss logs with another meaning; choose another key_format, or leave "
            "--enable_channel_loss out."
        )
