"""Batches whose rows hold several records, with the channels that `columns` keeps in a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.labels import channels_of
from channel_metrics.data.batch_layout import rows_of
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ChannelError, ConfigError
from channel_metrics.trainers.hf.batch import has_token_labels
from channel_metrics.trainers.hf.columns import LENGTHS_COLUMN, NAMES_COLUMN
from channel_metrics.trainers.hf.data import TokenBatchCollator
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin

__all__ = ["NamesMixin", "RowsCollator", "RowsMixin", "WithoutNames"]


class NamesMixin(ChannelMetricsMixin):
    """For frameworks whose rows keep the names of their channels in `NAMES_COLUMN`."""

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        super().start_channel_metrics(config.reading(NAMES_COLUMN))

    @contextmanager
    def _channel_collator(self, *args: Any) -> Iterator[None]:
        """As in the Trainer. Without metrics, too, its own collator must not get our columns."""
        with super()._channel_collator(*args):
            if not isinstance(self.data_collator, ChannelCollator):
                self.data_collator = WithoutNames(self.data_collator)
            yield


@dataclass(frozen=True)
class WithoutNames:
    """A collator that drops the columns of the channels, after the metrics have ended."""

    base: Callable[..., Any]

    def around(self, base: Callable[..., Any]) -> WithoutNames:
        """The same around another collator."""
        return WithoutNames(base)

    def __call__(self, features: Sequence[Any]) -> Any:
        """Collate rows, or lists of them."""
        return self.base([_without_names(feature) for feature in features])


def _without_names(feature: Any) -> Any:
    if isinstance(feature, list):
        return [_without_names(record) for record in feature]
    return {k: v for k, v in feature.items() if k not in (NAMES_COLUMN, LENGTHS_COLUMN)}


class RowsMixin(NamesMixin):
    """For frameworks that also pack."""

    def _collator_kind(self, dataset: Any, description: str, known: bool) -> type[ChannelCollator]:
        # As if the channels were known: to declare them does not help here.
        if super()._collator_kind(dataset, description, True) is not ChannelCollator:
            raise ConfigError(
                "one process sends its batches to the others (dispatch_batches), or rows are cut "
                "along the sequence, but channel metrics need whole rows here; set "
                "accelerator_config: {dispatch_batches: false}, or run without channel metrics."
            )
        return RowsCollator


class RowsCollator(TokenBatchCollator):
    """Adds the channels of all records of all rows, and where they begin.

    A row of several records is a list of them, or one with their names and `LENGTHS_COLUMN`. All
    records of a batch may also be in one row.
    """

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        rows = [row if isinstance(row, list) else [row] for row in features]
        records = [record for row in rows for record in row]
        batch = collate(features)
        if isinstance(batch, MutableMapping) and has_token_labels(batch):
            rows = [records] if rows_of(batch)[0] == 1 else rows
            if len(rows) < len(records) or any(LENGTHS_COLUMN in record for record in records):
                batch["channels"] = [n for r in records for n in channels_of(r, self.fields)]
                batch[self.bounds_key] = _bounds(batch, rows)
        return super()._with_channels(lambda _: batch, records)

    def _without_fields(self, feature: Any) -> Any:
        if isinstance(feature, list):
            return [self._without_fields(record) for record in feature]
        without = super()._without_fields(feature)
        return {key: value for key, value in without.items() if key != LENGTHS_COLUMN}


def _bounds(batch: Mapping[str, Any], rows: Sequence[Sequence[Any]]) -> Tensor:
    """int32 [records + 1]: where the records begin. Padding belongs to the record beside it."""
    width = rows_of(batch)[1]
    bounds: list[int] = []
    for number, row in enumerate(rows):
        lengths = [n for r in row for n in r.get(LENGTHS_COLUMN) or [len(r["input_ids"])]]
        ids = [token for record in row for token in record["input_ids"]][: sum(lengths)]
        first = number * width + _start(batch["input_ids"][number].tolist(), ids)
        bounds += [number * width, *(first + end for end in accumulate(lengths[:-1]))]
    return torch.tensor([*bounds, len(rows) * width], dtype=torch.int32, device="cpu")


def _start(row: list[int], ids: list[int]) -> int:
    """Where the tokens of the records stand in a row, which may be padded on either side."""
    for start in (0, len(row) - len(ids)):
        if row[start : start + len(ids)] == ids:
            return start
    raise ChannelError(
        f"a row of the batch must hold the {len(ids)} tokens of its records, but holds {row[:8]} "
        f"instead of {ids[:8]}; a collator that changes tokens needs to return `channels` itself."
    )
