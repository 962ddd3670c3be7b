"""One training run of Megatron's own loop: what its hooks do with the channels.

The hooks are in `channel_metrics.patches.megatron`; here is no patching. Every rank makes the
same calls in the same order: what a rank does not know (it has no data, no loss, no writer)
it takes part in with zeros.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import ChannelTable, metric_key
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.totals import RunTotals
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.megatron.arguments import (
    config_of,
    dataset_name,
    declared_names,
    name_by_path,
)
from channel_metrics.trainers.megatron.data import ChannelDataset

__all__ = ["TOTALS_FILE", "MegatronRun"]

# Beside Megatron's own files in the folder of a checkpoint.
TOTALS_FILE = "channel_metrics_totals.json"
_COUNTS = ("tokens", "samples", "nonfinite")


class MegatronRun:
    """The channels of one run: train and evaluation windows over one table."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.config = config_of(args)
        self._names = name_by_path(args)
        self.table = ChannelTable(
            dict.fromkeys((*declared_names(args), *self.config.channels)),
            unknown=self.config.unknown,
            key_format=self.config.key_format,
        )
        self.guard = FaultGuard(self.config.on_error)
        self.train = MegatronChannelMetrics(self.table, config=self.config, guard=self.guard)
        self.evaluation = MegatronChannelMetrics(self.table, config=self.config, guard=self.guard)

    def dataset(self, dataset: Any) -> ChannelDataset:
        """The data set with the channel of each sample."""
        return ChannelDataset(
            dataset,
            self.table,
            self._id_of,
            fields=self.config.fields,
            # Hybrid context parallelism sends the tokens of each sequence to other ranks.
            per_token=bool(getattr(self.args, "hybrid_context_parallel", False)),
        )

    def without_counts(self, values: Mapping[str, float]) -> dict[str, float]:
        """`values` of an interval that goes on, without what will be counted again at its end.

        Whoever adds up the tokens of a log must get the tokens of the run.
        """
        names = (*self.table.names, UNLABELED)
        counts = {metric_key(self.config.key_format, n, m) for n in names for m in _COUNTS}
        return {key: value for key, value in values.items() if key not in counts}

    def save(self, folder: Path, *, is_writer: bool) -> None:
        """Write the totals into the folder of a checkpoint; a collective."""
        totals = self.train.totals_now()
        if is_writer:
            totals.save(folder / TOTALS_FILE)

    def load(self, folder: Path) -> None:
        """Go on with the totals of a checkpoint; warn and start at zero if it has none."""
        path = folder / TOTALS_FILE
        if path.exists():
            self.train.totals = RunTotals.load(path)
            return
        warnings.warn(
            f"the checkpoint {folder} has no {TOTALS_FILE}: it was written without --channels. "
            "tokens_total and samples_total start at zero.",
            stacklevel=2,
        )

    def _id_of(self, path: str | None) -> int:
        if path not in self._names:
            self._names[path] = dataset_name(path)
        return self.table.ids([self._names[path]])[0]
