"""The mixin for Axolotl's trainer, and the collator of its padded and packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.collators.batching import (
    BatchSamplerDataCollatorForSeq2Seq,
    DataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from datasets import Dataset

from channel_metrics.config import MetricsConfig
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.trainers.axolotl.data import CHANNEL
from channel_metrics.trainers.hf.data import TokenBatchCollator
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin

__all__ = ["AxolotlMixin", "RowsCollator", "mixin_for"]

_PACKING = (BatchSamplerDataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq)


class RowsCollator(TokenBatchCollator):
    """Adds the channels of all records of all rows, and where they begin.

    With `sample_packing`, a row is a list of records, and a batch is a list of rows or one row.
    """

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        if not isinstance(self.base, DataCollatorForSeq2Seq):
            return super()._with_channels(collate, features)
        rows = [row if isinstance(row, list) else [row] for row in features]
        if isinstance(self.base, _PACKING) and not isinstance(features[0], list):
            rows = [list(features)]
        # Copied first, because Axolotl's collator changes its records.
        ids = [[token for record in row for token in record["input_ids"]] for row in rows]

        def with_records(_: Any) -> Any:
            batch = collate(features)
            batch["channels"] = [record.get(CHANNEL) for row in rows for record in row]
            batch[self.bounds_key] = self._bounds(batch, rows, ids)
            return batch

        return super()._with_channels(with_records, [record for row in rows for record in row])

    def _base_batch(self, features: Sequence[Any]) -> Any:
        if not isinstance(features[0], list):
            return super()._base_batch(features)
        return self.base([[self._without_fields(record) for record in row] for row in features])

    def _bounds(self, batch: Mapping[str, Any], rows: list[Any], ids: list[Any]) -> torch.Tensor:
        width, left = batch["input_ids"].shape[1], self.tokenizer.padding_side == "left"
        bounds = []
        for number, (row, tokens) in enumerate(zip(rows, ids, strict=True)):
            pads = width - len(tokens) if left else 0
            _check_row(batch["input_ids"][number, pads : pads + len(tokens)], tokens)
            ends = accumulate(len(record["input_ids"]) for record in row[:-1])
            bounds += [number * width, *(number * width + pads + end for end in ends)]
        return torch.tensor([*bounds, len(rows) * width], dtype=torch.int32, device="cpu")


class AxolotlMixin(ChannelMetricsMixin):
    """For `AxolotlTrainer`. The plugin has put all channels into the column `channel`."""

    eval_data_collator: Any

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        super().start_channel_metrics(config.reading(CHANNEL))

    def _collator_kind(self, *args: Any) -> type[ChannelCollator]:
        kind = super()._collator_kind(*args)
        return RowsCollator if kind is ChannelCollator else kind

    @contextmanager
    def _channel_collator(self, dataset: Any, description: str) -> Iterator[None]:
        """Inside this context, the collator for `dataset` also adds the channels.

        Axolotl has a second collator for evaluations, but not for streams.
        """
        if description == "train" or not isinstance(dataset, Dataset):
            with super()._channel_collator(dataset, description):
                yield
            return
        before = self.data_collator, self.eval_data_collator
        self.data_collator = self.eval_data_collator
        try:
            with super()._channel_collator(dataset, description):
                self.eval_data_collator = self.data_collator
                yield
        finally:
            self.data_collator, self.eval_data_collator = before

    def _set_signature_columns_if_needed(self) -> None:
        # With `sample_packing`, a second call of Axolotl's own raises KeyError.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        # With `balance_labels`, Axolotl asks for the class of its collator.
        before = self.data_collator
        if isinstance(before, ChannelCollator):
            self.data_collator = before.base
        try:
            return super()._get_train_sampler(*args, **kwargs)
        finally:
            self.data_collator = before


def mixin_for(trainer_class: type) -> type[ChannelMetricsMixin]:
    """The mixin for a trainer of Axolotl.

    Raises:
        UnsupportedVersionError: it is not that of supervised fine-tuning.
    """
    if not issubclass(trainer_class, AxolotlTrainer):
        raise UnsupportedVersionError(
            "channel metrics are for Axolotl's supervised fine-tuning, but this run has a "
            f"{trainer_class.__name__}; remove the plugin for this run."
        )
    return AxolotlMixin


def _check_row(row: torch.Tensor, ids: list[int]) -> None:
    if row.tolist() != ids:
        raise ChannelError(
            f"a row of the batch must hold the {len(ids)} tokens of its records, but holds "
            f"{row[:8].tolist()} instead of {ids[:8]}; remove the plugin if your collator changes "
            "tokens."
        )
