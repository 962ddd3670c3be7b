"""The common part of the mixins for `swift rlhf`: one channel per record, not per row."""

from __future__ import annotations

from typing import Any

import swift
from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.schema import Schema
from channel_metrics.data.batch_channels import take_channels
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.mixin import RESERVED_KEYS, ChannelMetricsMixin
from channel_metrics.trainers.swift.data import declare, wrapped_collator
from channel_metrics.trainers.trl.collator import RecordCollator

__all__ = ["SwiftRLHFMixin", "not_called"]


class SwiftRLHFMixin(ChannelMetricsMixin):
    """For trainers whose losses and metrics come from `get_batch_loss_metrics`.

    Training and evaluation call that method, so the records are counted there.
    """

    # What ms-swift's trainers have.
    args: Any
    template: Any

    def _schema(self) -> Schema:
        """The schema of the records."""
        raise NotImplementedError

    def _new_session(self, config: MetricsConfig) -> ChannelMetrics:
        return ChannelMetrics(
            config, reserved=RESERVED_KEYS, ranks=self._ranks(), schema=self._schema()
        )

    def _declare(self, session: ChannelMetrics, dataset: Any, split: str) -> bool:
        return declare(session, dataset, split)

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        self._declare(session, dataset, description)
        return wrapped_collator(session, self.data_collator, RecordCollator)

    def _observed_loss(self, compute: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss; see `get_batch_loss_metrics`."""
        return compute(*args, **kwargs)

    def get_batch_loss_metrics(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss and metrics; the records of the batch are counted."""
        # TRL's evaluations do not call `_prepare_inputs`, so our keys are still there.
        taken = take_channels(batch)
        if taken is not None:
            self.channel_scratch.pending = taken
        compute = super().get_batch_loss_metrics  # type: ignore[misc]
        return self._shielded(compute, self._observed_batch, model, batch, *args, **kwargs)

    def _observed_batch(self, compute: Any, model: Any, batch: Any, *args: Any, **kw: Any) -> Any:
        raise NotImplementedError

    def _count_records(
        self,
        session: ChannelMetrics,
        channels: Any,
        values: dict[str, Tensor],
        *,
        ours: Tensor | None,
        theirs: Tensor,
    ) -> None:
        """Count one value per record; records that accelerate has repeated are left out.

        Args:
            session: the session.
            channels: one per record, in the order of the values.
            values: {column: [records]}.
            ours, theirs: the loss of the batch that follows from the values, if it does, and the
                trainer's own.
        """
        real = self._real_records(session)
        count = len(channels) if real is None else min(real[0], len(channels))
        session.add(
            channels[:count],
            {name: value[:count] for name, value in values.items()},
            ours=ours,
            theirs=theirs,
        )


def not_called(trainer: Any, function: str) -> UnsupportedVersionError:
    """The error for a trainer that did not call the function that we read its values from."""
    return UnsupportedVersionError(
        f"channel metrics read what {function} returns or is given, but {type(trainer).__name__} "
        f"of ms-swift {swift.__version__} did not call it; use a tested version (see "
        "docs/ms_swift.md), or leave the metrics out."
    )
