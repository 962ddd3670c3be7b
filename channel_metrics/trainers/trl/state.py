"""The windows of TRL trainers whose unit is a sample: a preference pair, or a completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from channel_metrics.core.keys import ChannelTable
from channel_metrics.core.totals import RunTotals
from channel_metrics.ranks.sync import MISMATCH_TOLERANCE
from channel_metrics.trainers.hf.state import ChannelState
from channel_metrics.trainers.trl.sums import ChannelSums, ratio, sums_of_all_ranks

__all__ = ["SampleState"]

Sums = Mapping[str, float]


class SampleState(ChannelState):
    """Sums over samples instead of tokens; `samples` is the first column of every window.

    The trainer's own metrics are always logged. Of the config's metrics, `loss` is logged where
    there is one, `samples` for "samples" or "tokens", `share` is that of the samples, and
    `samples_total` is kept in checkpoints.
    """

    columns: tuple[str, ...] = ("samples",)
    train: Any
    evaluation: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set_columns(self.columns)

    def set_columns(self, columns: tuple[str, ...]) -> None:
        """Open new windows with other columns; `samples` stays the first."""
        self.columns = columns
        self.train = self._new_window(self.table)
        self.evaluation = self._new_window(self.table)

    @property
    def window(self) -> ChannelSums:
        """The window that is open now."""
        found: ChannelSums = self.evaluation if self.evaluating else self.train
        return found

    def values(self, sums: Sums) -> dict[str, float | None]:
        """The trainer's metrics of one channel; None is absent."""
        raise NotImplementedError

    def close_train(self, logs: dict[str, Any]) -> None:
        """Sum the train window over all ranks, write its metrics into `logs`, open the next."""
        sums = self._closed(self.train)
        self.totals = _with_samples(self.totals, sums)
        values = self._metrics(sums)
        if "samples_total" in self.config.metrics:
            for name, of_channel in values.items():
                of_channel["samples_total"] = self.totals.of(name)["samples_total"]
        self.closed_window = values
        self._write(values, logs, "")

    def close_evaluation(self, metrics: dict[str, Any], prefix: str) -> None:
        """The same for the evaluation window, for the channels that evaluation logs."""
        values = self._metrics(self._closed(self.evaluation))
        chosen = self.config.eval_channels or tuple(values)
        own_loss = {key: metrics.pop(key) for key in (f"{prefix}loss",) if key in metrics}
        self._write({name: values[name] for name in values if name in chosen}, metrics, prefix)
        # transformers' notebook takes the last `..._loss` for the loss of the whole set.
        metrics.update(own_loss)

    def totals_now(self) -> RunTotals:
        """The totals with the open window, over all ranks; the window stays open."""
        return _with_samples(
            self.totals, sums_of_all_ranks(self.train, alone=self.alone, guard=self.guard)[0]
        )

    def _new_window(self, table: ChannelTable) -> ChannelSums:
        return ChannelSums(table, self.columns)

    def _closed(self, window: ChannelSums) -> dict[str, dict[str, float]]:
        sums, mismatch = sums_of_all_ranks(window, alone=self.alone, guard=self.guard)
        window.reset()
        if mismatch > MISMATCH_TOLERANCE:
            self.warn_once(
                "the channels of a window add up to a loss that differs from the trainer's own "
                f"by {mismatch:.1e} (relative); please report this with your model and trainer."
            )
        return sums

    def _metrics(self, sums: Mapping[str, Sums]) -> dict[str, dict[str, float]]:
        total = sum(of_channel["samples"] for of_channel in sums.values())
        return {name: self._of_channel(of_channel, total) for name, of_channel in sums.items()}

    def _of_channel(self, sums: Sums, total: float) -> dict[str, float]:
        values = {n: v for n, v in self.values(sums).items() if v is not None}
        if "loss" not in self.config.metrics:
            values.pop("loss", None)
        if {"samples", "tokens"} & set(self.config.metrics):
            values["samples"] = sums["samples"]
        share = ratio(sums["samples"], total)
        if "share" in self.config.metrics and share is not None:
            values["share"] = share
        return values


def _with_samples(totals: RunTotals, sums: Mapping[str, Sums]) -> RunTotals:
    state = totals.copy().state_dict()
    for name, of_channel in sums.items():
        before = state["channels"].setdefault(name, totals.of(name))
        before["samples_total"] += int(of_channel["samples"])
    return RunTotals().load_state_dict(state)
