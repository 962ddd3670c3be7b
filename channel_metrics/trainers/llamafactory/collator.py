"""Batches of LLaMA-Factory's rows, with the channels that `data` keeps in the dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from channel_metrics.core.labels import channels_of
from channel_metrics.errors import ChannelError
from channel_metrics.trainers.hf.batch import has_token_labels
from channel_metrics.trainers.hf.data import TokenBatchCollator
from channel_metrics.trainers.llamafactory.data import CHANNEL, LENGTHS

__all__ = ["RowsCollator"]


class RowsCollator(TokenBatchCollator):
    """Adds the channels of all parts of all rows, and where they begin."""

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        if not all(CHANNEL in record for record in features):
            return super()._with_channels(collate, features)

        def with_parts(records: Sequence[Any]) -> Any:
            batch = collate(records)
            if isinstance(batch, MutableMapping) and has_token_labels(batch):
                batch.update(self._parts(batch, features))
            return batch

        return super()._with_channels(with_parts, features)

    def _base_batch(self, features: Sequence[Any]) -> Any:
        without = [{k: v for k, v in record.items() if k != LENGTHS} for record in features]
        return super()._base_batch(without)

    def _parts(self, batch: Mapping[str, Any], records: Sequence[Any]) -> dict[str, Any]:
        names = [name for record in records for name in channels_of(record, (CHANNEL,))]
        if not any(LENGTHS in record for record in records):
            return {"channels": names}
        rows, width = batch["labels"].shape
        starts = []
        for number, record in enumerate(records):
            ends = list(accumulate(record[LENGTHS]))
            _check_row(batch["input_ids"][number], record["input_ids"][: ends[-1]])
            starts += [number * width + start for start in (0, *ends[:-1])]
        bounds = torch.tensor([*starts, rows * width], dtype=torch.int32, device="cpu")
        return {"channels": names, self.bounds_key: bounds}


def _check_row(row: Any, ids: list[int]) -> None:
    if row[: len(ids)].tolist() != list(ids):
        raise ChannelError(
            f"a row of the batch must begin with the {len(ids)} tokens of its pack, but begins "
            f"with {row[:8].tolist()} instead of {list(ids[:8])}; pad on the right."
        )
