"""The channels of a dataset, where they can be known before it is read: a column of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from channel_metrics.core.labels import channels_of, field_roots
from channel_metrics.errors import ChannelError

__all__ = ["count_channels", "scan_channels"]

logger = logging.getLogger("channel_metrics")

_SCAN_ROWS = 65_536


def scan_channels(dataset: Any, fields: Sequence[str], split: str) -> list[str] | None:
    """The channels of a dataset, sorted, so that all ranks give them the same ids.

    None for a dataset that cannot be scanned. Raises `ChannelError` if no record of a training set
    has a channel.
    """
    counts = count_channels(dataset, fields)
    if counts is None:
        return None
    unlabeled = counts.pop(None, 0)
    if not counts and unlabeled and split == "train":
        columns = getattr(dataset, "column_names", None) or sorted(dataset[0])
        raise ChannelError(
            f"none of the {unlabeled} records of the {split} set has a channel: looked for "
            f"{', '.join(fields)}, found columns {', '.join(columns)}; set `fields` to the one "
            "that names the source."
        )
    names = sorted(name for name in counts if name is not None)
    listed = ", ".join(f"{name} {counts[name]}" for name in names[:20])
    more = f", and {len(names) - 20} more" if len(names) > 20 else ""
    logger.info("%s set: %s%s; unlabeled %d", split, listed or "no channel", more, unlabeled)
    if unlabeled:
        logger.warning(
            "%d of %d records of the %s set have no channel; their tokens count as 'unlabeled'.",
            unlabeled,
            unlabeled + sum(counts.values()),
            split,
        )
    return names


def count_channels(dataset: Any, fields: Sequence[str]) -> Counter[str | None] | None:
    """{channel: records} of a `datasets.Dataset` or a list of records; None for other datasets.

    Reads the channel columns only. A packed record counts once for each of its sequences.
    """
    if isinstance(dataset, (list, tuple)) and dataset and isinstance(dataset[0], Mapping):
        return Counter(name for record in dataset for name in channels_of(record, fields))
    if not hasattr(dataset, "select_columns") or not hasattr(dataset, "with_format"):
        return None
    if not hasattr(dataset, "__len__"):
        return None
    return Counter(
        name for record in _records(dataset, fields) for name in channels_of(record, fields)
    )


def _records(dataset: Any, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    roots = [root for root in field_roots(fields) if root in dataset.column_names]
    roots += [field for field in fields if field in dataset.column_names and field not in roots]
    if not roots:
        yield from ({} for _ in range(len(dataset)))
        return
    for batch in dataset.select_columns(roots).with_format(None).iter(batch_size=_SCAN_ROWS):
        for values in zip(*(batch[root] for root in roots), strict=True):
            yield dict(zip(roots, values, strict=True))
