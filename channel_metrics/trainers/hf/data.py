"""Channels in the data that a transformers Trainer reads: columns, scans, the wrapped collator."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import ChannelTable
from channel_metrics.core.labels import channels_of, field_roots
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ChannelError

__all__ = ["BOUNDS_KEY", "count_channels", "declare_channels", "wrap_collator"]

logger = logging.getLogger("channel_metrics")

# Not "cu_seqlens": a model may take an argument of that name, which must reach it untouched.
BOUNDS_KEY = "channel_cu_seqlens"

_SCAN_ROWS = 65_536


def wrap_collator(
    base: Callable[[list[Any]], Any],
    *,
    fields: Sequence[str],
    table: ChannelTable | None,
    signature_columns: Sequence[str],
    remove_unused_columns: bool,
    kind: type[ChannelCollator] = ChannelCollator,
    guard: FaultGuard | None = None,
) -> ChannelCollator:
    """`base` with channels, seeing exactly the columns that it would see without us.

    With `remove_unused_columns` the trainer would have dropped the channel's column, so it is
    stripped; transformers' and TRL's own collators can only choke on it; any other collator
    gets what it always got.
    """
    theirs = type(base).__module__.split(".")[0] in ("transformers", "trl") or (
        getattr(base, "__module__", "").split(".")[0] in ("transformers", "trl")
    )
    drop = remove_unused_columns or theirs
    strip = [root for root in field_roots(fields) if drop and root not in signature_columns]
    return kind(
        base,
        fields=fields,
        table=table,
        strip=strip,
        bounds_key=BOUNDS_KEY,
        row_bounds=False,
        guard=guard,
    )


def declare_channels(
    dataset: Any, *, fields: Sequence[str], table: ChannelTable, description: str
) -> bool:
    """Put the channels of a dataset that can be scanned into `table`; False if it cannot be.

    Raises `ChannelError` if no record of a training set has a channel. Channels are sorted, so
    that all ranks get the same ids.
    """
    counts = count_channels(dataset, fields)
    if counts is None:
        return False
    unlabeled = counts.pop(None, 0)
    if not counts and unlabeled and description == "train":
        columns = getattr(dataset, "column_names", None) or sorted(dataset[0])
        raise ChannelError(
            f"none of the {unlabeled} records of the {description} set has a channel: looked for "
            f"{', '.join(fields)}, found columns {', '.join(columns)}; set `fields` to the one "
            "that names the source."
        )
    names = sorted(name for name in counts if name is not None)
    if table.unknown == "add":
        for name in names:
            table.add(name)
    else:
        table.ids(names)
    listed = ", ".join(f"{name} {counts[name]}" for name in names[:20])
    more = f", and {len(names) - 20} more" if len(names) > 20 else ""
    logger.info("%s set: %s%s; unlabeled %d", description, listed or "no channel", more, unlabeled)
    if unlabeled:
        logger.warning(
            "%d of %d records of the %s set have no channel; their tokens count as 'unlabeled'.",
            unlabeled,
            unlabeled + sum(counts.values()),
            description,
        )
    return True


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
