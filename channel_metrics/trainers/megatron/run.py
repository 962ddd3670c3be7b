"""One training run of Megatron's own loop: what its hooks do with the channels.

The hooks are in `channel_metrics.trainers.megatron.hooks`; here is no patching. Every rank makes
the same calls in the same order: what a rank does not know (it has no data, no loss, no writer)
it takes part in with zeros.
"""

from __future__ import annotations

from typing import Any

from channel_metrics.trainers.megatron.arguments import dataset_name, name_by_path, session_of
from channel_metrics.trainers.megatron.counting import MegatronChannelMetrics
from channel_metrics.trainers.megatron.data import ChannelDataset

__all__ = ["MegatronRun"]


class MegatronRun:
    """The session of one run, and what counts into it."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.session = session_of(args)
        self.metrics = MegatronChannelMetrics(session=self.session)
        self._names = name_by_path(args)

    def dataset(self, dataset: Any) -> ChannelDataset:
        """The data set with the channel of each sample."""
        return ChannelDataset(
            dataset,
            self.session.labels,
            self._id_of,
            declare=self.session.declare_names,
            fields=self.session.config.fields,
            # Hybrid context parallelism sends the tokens of each sequence to other ranks.
            per_token=bool(getattr(self.args, "hybrid_context_parallel", False)),
        )

    def _id_of(self, path: str | None) -> int:
        name = self._names.setdefault(path, dataset_name(path))
        self.session.declare_names([name])
        return self.session.labels.ids([name])[0]
