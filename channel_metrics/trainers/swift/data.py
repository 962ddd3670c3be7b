"""The dataset column `channel`, which ms-swift keeps, while it drops others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from channel_metrics.core.token_axes import TokenColumn
from channel_metrics.data.carried import carried_of
from channel_metrics.data.collator import BOUNDS_KEY, ChannelCollator
from channel_metrics.data.scan import count_channels
from channel_metrics.errors import ChannelError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.wanted import rows_of

__all__ = ["CHANNEL_COLUMN", "ColumnMixin", "records_of", "wrapped_collator"]

CHANNEL_COLUMN = "channel"


def records_of(dataset: Any) -> Any:
    """The dataset of records inside ms-swift's own wrappers, such as lazy encoding and packing.

    A wrapper of somebody else is not opened, because it may change the channels.
    """
    while type(dataset).__module__.split(".")[0] == "swift" and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


class ColumnMixin(ChannelMetricsMixin):
    """Reads the channels of a dataset from the column that ms-swift keeps."""

    def _declare(self, session: ChannelMetrics, dataset: Any, split: str) -> bool:
        records = records_of(dataset)
        try:
            return session.declare(records, split, fields=(CHANNEL_COLUMN,))
        except ChannelError as error:
            columns = getattr(records, "column_names", None)
            if columns is None or CHANNEL_COLUMN in columns:
                raise
            raise ChannelError(
                f"{error} ms-swift keeps the column {CHANNEL_COLUMN!r} of a dataset and drops "
                f"others; the patch ms_swift fills it from {', '.join(session.config.fields)}."
            ) from None

    def channel_names(self, session: ChannelMetrics, dataset: Any) -> set[str] | None:
        """The channels of a dataset; None if it cannot be scanned."""
        counts = count_channels(records_of(dataset), (CHANNEL_COLUMN,))
        return rows_of(session, counts)


def wrapped_collator(
    session: ChannelMetrics,
    base: Callable[..., Any],
    kind: type[ChannelCollator],
    columns: Sequence[TokenColumn] = (),
) -> ChannelCollator:
    """A collator of this kind around that of the trainer, after `_declare`."""
    return kind(
        base,
        fields=(CHANNEL_COLUMN,),
        table=session.labels if session.labels.names else None,
        strip=(),
        bounds_key=BOUNDS_KEY,
        row_bounds=False,
        carry_faults=True,
        classes=session.classes,
        carried=carried_of(session.config),
        columns=columns,
    )
