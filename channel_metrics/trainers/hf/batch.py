"""The part of a Trainer's batch that is ours: taken out before the model sees it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from torch import Tensor

from channel_metrics.capture.logits import shifted_labels
from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.core.boundaries import sequence_index
from channel_metrics.core.sums import TokenValues
from channel_metrics.data.collator import BOUNDS_KEY, RECORDS_KEY, CollatorFault

__all__ = [
    "BatchChannels",
    "Scratch",
    "first_records",
    "has_token_labels",
    "labels_of",
    "real_records",
    "repeats_unseen",
    "take_channels",
]


@dataclass(frozen=True)
class BatchChannels:
    """channels: per sequence (ids or names), or ids of the targets [B, S], see `parallel`.
    cu_seqlens: int32 [num_sequences + 1], None where every row is one sequence. records: the
    number of the record in each row or sequence, None where they are in order."""

    channels: Tensor | list[str | None]
    cu_seqlens: Tensor | None
    records: Tensor | None = None

    @property
    def per_token(self) -> bool:
        """Whether the channels are ids of tokens."""
        return isinstance(self.channels, Tensor) and self.channels.dim() == 2

    @property
    def num_sequences(self) -> int:
        """The number of sequences (of rows, for ids per token)."""
        return len(self.channels)


@dataclass
class Scratch:
    """What a trainer knows of the micro-batch that it computes now.

    reader: of the model's token losses. pending: the channels that were taken out of the batch.
    cut: whether the context that the next loss is computed in cuts the rows. logs_next: whether
    the next log is that of the training loop itself. own_keys: what we have put into the results
    of evaluations.
    """

    reader: TokenLossReader
    pending: BatchChannels | CollatorFault | None = None
    cut: bool = False
    logs_next: bool = False
    own_keys: set[str] = field(default_factory=set)


def take_channels(inputs: MutableMapping[str, Any]) -> BatchChannels | CollatorFault | None:
    """Remove our keys from `inputs`; None if they are not there."""
    channels, cu_seqlens = inputs.pop("channels", None), inputs.pop(BOUNDS_KEY, None)
    records = inputs.pop(RECORDS_KEY, None)
    if channels is None or isinstance(channels, CollatorFault):
        return channels
    return BatchChannels(channels, cu_seqlens, records)


def has_token_labels(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch of an encoder or decoder has a label per token, and not per record.

    False for the labels of a classifier or a regressor, and where there are none.
    """
    labels, ids = inputs.get("labels"), inputs.get("input_ids")
    if labels is None:
        labels = inputs.get("shift_labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return labels.dim() == 2 or (isinstance(ids, Tensor) and labels.shape == ids.shape)


def labels_of(batch: BatchChannels, inputs: Mapping[str, Any]) -> Any:
    """The labels that the channels stand beside: as they are, or shifted for ids per token."""
    labels = inputs.get("labels")
    if not batch.per_token:
        return labels
    shifted = inputs.get("shift_labels")
    return shifted_labels(labels) if shifted is None and isinstance(labels, Tensor) else shifted


def real_records(accelerator: Any, data_rank: int, data_size: int) -> tuple[int, int] | None:
    """(records that are no repetitions, records) of this rank in an evaluation batch.

    None means that there are no repetitions. accelerate repeats the first samples so that all
    ranks get even last batches, and drops them again when it gathers for metrics, by this same
    count. In training they are kept: the model is trained on them.
    """
    state = accelerator.gradient_state
    if data_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    remainder, loader = int(state.remainder), state.active_dataloader
    if isinstance(loader, DataLoaderDispatcher):
        # Dispatched: the last batch of all ranks is filled up to the next multiple of them.
        per_rank = -(-remainder // data_size)
    elif accelerator.even_batches:
        per_rank = loader.total_batch_size // data_size
    else:
        return None
    return min(max(remainder - data_rank * per_rank, 0), per_rank), per_rank


def repeats_unseen(loader: Any, accelerator: Any) -> bool:
    """Whether accelerate may repeat records of a stream whose length nobody knows."""
    stream = isinstance(getattr(loader, "dataset", None), IterableDatasetShard)
    return stream and accelerator.num_processes > 1


def first_records(
    batch: BatchChannels, values: TokenValues, count: int, per_rank: int
) -> tuple[BatchChannels, TokenValues] | None:
    """Only the first `count` of `per_rank` records; nothing is read from the device.

    None if it cannot be told what a record is: neither a row nor a sequence.
    """
    if batch.records is not None:
        batch, values = _in_order_of_records(batch, batch.records, values)
    shape, bounds = values.mask.shape, batch.cu_seqlens
    rows = shape[0] if len(shape) == 2 else 1
    if rows == per_rank:
        end: Any = count * shape[-1]
    elif batch.num_sequences == per_rank and bounds is not None:
        end = bounds[count]
    else:
        return None
    positions = torch.arange(values.mask.numel(), device=values.mask.device)
    kept = values._replace(mask=values.mask & (positions < end).view(shape))
    if bounds is None:
        if batch.per_token:
            return batch, kept
        # Without bounds a row is a sequence, and would count as one sample.
        return BatchChannels(batch.channels[:count], None), _rows(kept, count)
    # Sequences behind the end become empty: no tokens, no samples.
    return BatchChannels(batch.channels, bounds.clamp(max=end)), kept


def _in_order_of_records(
    batch: BatchChannels, records: Tensor, values: TokenValues
) -> tuple[BatchChannels, TokenValues]:
    """The rows, or the sequences, as they would be if the collator had kept their order."""
    order, channels = records.argsort(), batch.channels
    if isinstance(channels, Tensor):
        channels = channels[order]
    else:
        channels = [channels[i] for i in order.tolist()]
    shape, bounds = values.mask.shape, batch.cu_seqlens
    if shape[0] == len(order) and len(shape) == 2:
        return BatchChannels(channels, bounds), values.map(lambda rows: rows[order])
    assert bounds is not None
    # Tokens move with their sequence; those past the last bound stay where they are.
    ranks = torch.nn.functional.pad(records, (0, 1), value=len(order))
    moved = ranks[sequence_index(bounds, values.mask.numel())].argsort(stable=True)
    bounds = torch.nn.functional.pad(bounds.diff()[order].cumsum(0), (1, 0)).to(bounds.dtype)
    return BatchChannels(channels, bounds), values.map(lambda t: t.flatten()[moved].view(shape))


def _rows(values: TokenValues, count: int) -> TokenValues:
    return TokenValues(
        values.losses[:count],
        values.mask[:count],
        None if values.correct is None else values.correct[:count],
        None if values.weights is None else values.weights[:count],
    )
