"""Finds the channels of a dataset before training, from its channel columns."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch.utils.data import Subset

from channel_metrics.core.labels import channels_of, field_columns, field_roots
from channel_metrics.core.names import fields_of_channel, look_up, split_field, split_name
from channel_metrics.data.carried import without_carried
from channel_metrics.errors import ChannelError

__all__ = [
    "class_names",
    "count_channels",
    "label_records",
    "learn_classes",
    "scan_channels",
]

logger = logging.getLogger("channel_metrics")

# Rows that are read at once: fewer if records list channels, because such lists may be long.
_SCAN_ROWS, _SCAN_LISTS = 65_536, 1_024


def scan_channels(
    dataset: Any, fields: Sequence[str], split: str, *, needed: bool = True
) -> list[str] | None:
    """The channels of a dataset, sorted, so that all ranks give them the same ids.

    Args:
        dataset: see `count_channels`.
        fields: dotted record fields that may hold the channel.
        split: its name, for messages; only `train` must have channels.
        needed: whether a training set must have channels. False if the collator returns them.

    Returns:
        The names; None for a dataset that cannot be scanned.

    Raises:
        ChannelError: channels are needed, and no record of the training set has one.
    """
    counts = count_channels(dataset, fields)
    if counts is None:
        return None
    names = sorted(name for name in counts if name is not None)
    of_channels: Counter[str | None] = Counter()
    for name, count in counts.items():
        of_channels[None if name is None else split_name(name)[0]] += count
    unlabeled = of_channels.pop(None, 0)
    if not of_channels and unlabeled and needed and split == "train":
        columns = getattr(dataset, "column_names", None) or sorted(dataset[0])
        raise ChannelError(
            f"none of the {unlabeled} records of the {split} set has a channel: looked for "
            f"{', '.join(fields_of_channel(fields))}, found columns {', '.join(columns)}; set "
            "`fields` to the one that names the source."
        )
    channels = sorted(name for name in of_channels if name is not None)
    listed = ", ".join(f"{name} {of_channels[name]}" for name in channels[:20])
    more = f", and {len(channels) - 20} more" if len(channels) > 20 else ""
    logger.info("%s set: %s%s; unlabeled %d", split, listed or "no channel", more, unlabeled)
    if unlabeled:
        logger.warning(
            "%d of %d records of the %s set have no channel; their tokens count as 'unlabeled'.",
            unlabeled,
            counts.total(),
            split,
        )
    return names


def count_channels(dataset: Any, fields: Sequence[str]) -> Counter[str | None] | None:
    """{channel: number of records}; None stands for records without a channel.

    A record that lists channels counts once for each entry.

    Args:
        dataset: a `datasets.Dataset`, of which only the channel columns are read, or a list of
            records. For other datasets, the result is None.
        fields: dotted record fields that may hold the channel.
    """
    classes = class_names(dataset, fields)
    if isinstance(dataset, (list, tuple)) and dataset and isinstance(dataset[0], Mapping):
        return Counter(name for record in dataset for name in channels_of(record, fields))
    if not hasattr(dataset, "select_columns") or not hasattr(dataset, "with_format"):
        return None
    if not hasattr(dataset, "__len__"):
        return None
    counts: Counter[str | None] = Counter()
    for record in label_records(dataset, fields):
        counts.update(map(without_carried, channels_of(record, fields, classes)))
    return counts


def class_names(dataset: Any, fields: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """{field: class names} of the fields whose column holds a `ClassLabel`, or lists of them."""
    while isinstance(dataset, Subset):  # made by torch's `random_split`
        dataset = dataset.dataset
    features = getattr(dataset, "features", None)
    found: dict[str, tuple[str, ...]] = {}
    if not isinstance(features, Mapping):
        return found
    for entry in fields:
        field = split_field(entry)[1]
        feature = look_up(features, field)
        feature = getattr(feature, "feature", feature)
        if type(feature).__name__ == "ClassLabel" and feature.names:
            found[field] = tuple(feature.names)
    return found


def learn_classes(
    classes: MutableMapping[str, Sequence[str]], dataset: Any, fields: Sequence[str]
) -> None:
    """Add the class names of a dataset to those that a collator knows.

    Raises `ChannelError` if a dataset before it has numbered the same classes differently.
    """
    for field, names in class_names(dataset, fields).items():
        if classes.setdefault(field, names) != names:
            raise ChannelError(
                f"the data sets of two data loaders number the classes of {field!r} in different "
                "ways, but share a collator; make one with `metrics.collator` for each of them."
            )


def label_records(dataset: Any, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of a `datasets.Dataset`, with only the columns that may hold `fields`."""
    roots = [root for root in field_roots(fields) if root in dataset.column_names]
    columns = field_columns(fields) - {*roots}
    roots += [column for column in dataset.column_names if column in columns]
    if not roots:
        yield from ({} for _ in range(len(dataset)))
        return
    lists = any(_is_list(dataset.features.get(root)) for root in roots)
    size = _SCAN_LISTS if lists else _SCAN_ROWS
    for batch in dataset.select_columns(roots).with_format(None).iter(batch_size=size):
        for values in zip(*(batch[root] for root in roots), strict=True):
            yield dict(zip(roots, values, strict=True))


def _is_list(feature: Any) -> bool:
    return isinstance(feature, list) or hasattr(feature, "feature")
