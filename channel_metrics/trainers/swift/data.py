"""The dataset column `channel`, which ms-swift keeps, while it drops others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset, Value

from channel_metrics.core.labels import channel_of, field_roots
from channel_metrics.data.collator import BOUNDS_KEY, ChannelCollator
from channel_metrics.data.scan import class_names
from channel_metrics.errors import ChannelError
from channel_metrics.session import ChannelMetrics

__all__ = [
    "CHANNEL_COLUMN",
    "declare",
    "records_of",
    "with_channel_column",
    "wrapped_collator",
]

CHANNEL_COLUMN = "channel"
_SCAN_ROWS = 65_536


def with_channel_column(dataset: Any, fields: Sequence[str], column: str = CHANNEL_COLUMN) -> Any:
    """Add the dataset column `channel`, before ms-swift's preprocessing.

    Class numbers become names, because ms-swift does not keep the `ClassLabel` of a column.

    Args:
        dataset: a dataset or a stream. Anything else is returned as it is.
        fields: dotted fields that may hold the channel. The first that a record has is used.
        column: another name for the column.

    Returns:
        A dataset with the column, or the same object if there is nothing to fill in.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)) or not dataset.column_names:
        return dataset
    roots = [root for root in field_roots(fields) if root in dataset.column_names]
    classes = class_names(dataset, fields)
    if not set(roots) - {column} and not classes:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(
            _with_channel,
            fn_kwargs={"fields": tuple(fields), "classes": classes, "column": column},
            features=_features(dataset, column),
        )
    names = [
        channel_of(dict(zip(roots, values, strict=True)), fields, classes)
        for batch in dataset.select_columns(roots).with_format(None).iter(batch_size=_SCAN_ROWS)
        for values in zip(*(batch[root] for root in roots), strict=True)
    ]
    if not any(name is not None for name in names):
        return dataset
    if column in dataset.column_names:
        dataset = dataset.remove_columns(column)
    return dataset.add_column(column, names)


def records_of(dataset: Any) -> Any:
    """The dataset of records inside ms-swift's own wrappers, such as lazy encoding and packing.

    A wrapper of somebody else is not opened, because it may change the channels.
    """
    while type(dataset).__module__.split(".")[0] == "swift" and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def declare(session: ChannelMetrics, dataset: Any, split: str) -> bool:
    """Scan the records of a dataset for channels; False if they cannot be scanned.

    Raises `ChannelError` if no record of a training set has a channel.
    """
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


def wrapped_collator(
    session: ChannelMetrics, base: Callable[..., Any], kind: type[ChannelCollator]
) -> ChannelCollator:
    """A collator of this kind around that of the trainer, after `declare`."""
    return kind(
        base,
        fields=(CHANNEL_COLUMN,),
        table=session.labels if session.labels.names else None,
        strip=(),
        bounds_key=BOUNDS_KEY,
        row_bounds=False,
        carry_faults=True,
        classes=session.classes,
    )


def _features(dataset: Any, column: str) -> Any:
    if dataset.features is None:
        return None
    features = dataset.features.copy()
    features[column] = Value("string")
    return features


def _with_channel(
    record: dict[str, Any],
    fields: tuple[str, ...],
    classes: Mapping[str, Sequence[str]],
    column: str,
) -> dict[str, Any]:
    return {**record, column: channel_of(record, fields, classes)}
