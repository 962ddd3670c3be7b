"""Trainers built on TRL whose losses and metrics come from `get_batch_loss_metrics`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.schema import Schema
from channel_metrics.data.batch_channels import take_channels
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.mixin import RESERVED_KEYS, ChannelMetricsMixin

__all__ = ["RecordsMixin", "not_called"]


class RecordsMixin(ChannelMetricsMixin):
    """Counts records, one channel each.

    Training and evaluation call `get_batch_loss_metrics`, so the records are counted there.
    """

    def _schema(self) -> Schema:
        """The schema of the records."""
        raise NotImplementedError

    def _new_session(self, config: MetricsConfig) -> ChannelMetrics:
        return ChannelMetrics(
            config, reserved=RESERVED_KEYS, ranks=self._ranks(), schema=self._schema()
        )

    def _observed_loss(self, compute: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss; see `get_batch_loss_metrics`."""
        return compute(*args, **kwargs)

    def get_batch_loss_metrics(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss and metrics; the records of the batch are counted."""
        # TRL's evaluations do not call `_prepare_inputs`, so our keys are still there.
        taken = take_channels(batch)
        if taken is not None:
            self.channel_scratch.pending = taken
        theirs: Any = super()
        compute = theirs.get_batch_loss_metrics
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
    own = next(c for c in type(trainer).__mro__ if not c.__module__.startswith("channel_metrics."))
    return UnsupportedVersionError(
        f"channel metrics read what {function} returns or is given, but {own.__name__} of "
        f"{own.__module__.split('.')[0]} did not call it; use a tested version (see its page in "
        "docs/), or leave the metrics out."
    )
