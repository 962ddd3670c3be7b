"""Trainers whose unit is a record, with one channel each: a pair, or an answer in KTO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.schema import Schema
from channel_metrics.data.batch_channels import take_channels
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ConfigError, UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.swap import wrapped
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.trl.collator import RecordCollator
from channel_metrics.trainers.trl.samples import reserved_keys

__all__ = ["BatchRecordsMixin", "Call", "RecordsMixin", "kept_calls", "not_called"]


class RecordsMixin(ChannelMetricsMixin):
    """Counts records. In a batch of pairs, the rejected rows follow the chosen ones."""

    _collator_name = "channel_metrics.trainers.trl.collator.RecordCollator"

    def _schema(self) -> Schema:
        """The schema of the records."""
        raise NotImplementedError

    def _new_session(self, config: MetricsConfig) -> ChannelMetrics:
        schema = self._schema()
        reserved = reserved_keys(schema)
        return ChannelMetrics(config, reserved=reserved, ranks=self._ranks(), schema=schema)

    def _collator_kind(self, dataset: Any, description: str, known: bool) -> type[ChannelCollator]:
        if super()._collator_kind(dataset, description, known) is not ChannelCollator:
            raise ConfigError(
                "the batches of preference pairs are cut along the sequence (cp_size, sp_size), "
                "or sent by one process to the others (dispatch_batches), so it is not known which "
                "pair a row belongs to; set both off, or detach the metrics."
            )
        return RecordCollator

    def _count_records(
        self,
        session: ChannelMetrics,
        channels: Any,
        values: Mapping[str, Tensor],
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
        values = {"samples": torch.ones_like(values["chosen"]), **values}
        session.add(
            channels[:count],
            {name: value[:count] for name, value in values.items()},
            ours=ours,
            theirs=theirs,
        )


class Call(NamedTuple):
    """A call of a trainer's method: its arguments, and its first three results, detached."""

    args: tuple[Any, ...]
    results: tuple[Tensor, ...]


class BatchRecordsMixin(RecordsMixin):
    """For trainers whose losses and metrics come from `get_batch_loss_metrics`, as in trl 0.29.

    It is called in training and in evaluation. Inside, it calls a method that returns the losses
    and the rewards of the records.

    Attributes:
        channel_loss: the name of that method.
    """

    channel_loss = ""

    def _values(self, calls: Sequence[Call], batch: Any) -> dict[str, Tensor]:
        """{column: values [records]}, from the calls of `channel_loss`."""
        raise NotImplementedError

    def _batch_loss(self, values: Mapping[str, Tensor], **given: Any) -> Tensor | None:
        """The loss of the batch, from the values; None if it does not follow from them.

        given: the keywords that `get_batch_loss_metrics` was called with.
        """
        return values["loss"].mean()

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
        session, taken = self.channel_metrics, self._taken_channels(batch)
        assert session is not None
        with kept_calls(self, self.channel_loss) as calls:
            result = compute(model, batch, *args, **kw)
        if not calls:
            raise not_called(self, self.channel_loss)
        with torch.no_grad():
            values = self._values(calls, batch)
            ours = self._batch_loss(values, **kw)
        theirs = result[0].detach()
        self._count_records(session, taken.channels, values, ours=ours, theirs=theirs)
        return result


@contextmanager
def kept_calls(trainer: Any, name: str) -> Iterator[list[Call]]:
    """The calls of a trainer's method inside the block; none if it has no such method."""
    calls: list[Call] = []

    def keep(original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        # Not copied: LLaMA-Factory adds the term of pref_ftx to the losses in place.
        calls.append(Call(args, tuple(part.detach() for part in result[:3])))
        return result

    if not hasattr(trainer, name):
        yield calls
        return
    with wrapped(trainer, name, keep):
        yield calls


def not_called(trainer: Any, function: str) -> UnsupportedVersionError:
    """The error for a trainer that did not call the function that we read its values from."""
    own = next(c for c in type(trainer).__mro__ if not c.__module__.startswith("channel_metrics."))
    return UnsupportedVersionError(
        f"channel metrics read what {function} returns or is given, but {own.__name__} of "
        f"{own.__module__.split('.')[0]} did not call it; use a tested version (see its page in "
        "docs/), or leave the metrics out."
    )
