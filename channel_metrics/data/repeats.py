"""Records that are repeated to fill the last evaluation batch of all ranks."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from channel_metrics.core.boundaries import sequence_index
from channel_metrics.core.sums import TokenValues
from channel_metrics.data.batch_channels import BatchChannels

__all__ = ["first_records", "real_records", "real_records_of_sampler", "repeats_unseen"]


def real_records(accelerator: Any, data_rank: int, data_size: int) -> tuple[int, int] | None:
    """Count the records of an evaluation batch that accelerate has not repeated.

    accelerate repeats the first records so that the last batches of all ranks have the same size.
    It drops them by this same count when it gathers values for metrics. In training they are
    kept, because the model is trained on them.

    Args:
        accelerator: the `Accelerator` that prepared the data loader.
        data_rank: the number of this rank among those that read different rows.
        data_size: how many such ranks there are.

    Returns:
        (records without repetitions, all records) in the batch of this rank; None if nothing is
        repeated.
    """
    from accelerate.data_loader import DataLoaderDispatcher

    state = accelerator.gradient_state
    if data_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    remainder, loader = int(state.remainder), state.active_dataloader
    if isinstance(loader, DataLoaderDispatcher):
        # One process sends the batches. It fills the last one up to a multiple of the ranks.
        per_rank = -(-remainder // data_size)
    elif accelerator.even_batches:
        per_rank = loader.total_batch_size // data_size
    else:
        return None
    return min(max(remainder - data_rank * per_rank, 0), per_rank), per_rank


def real_records_of_sampler(loader: Any, batch_idx: int) -> tuple[int, int] | None:
    """Count the records of a batch that torch's `DistributedSampler` has not repeated.

    It repeats the first records at the end, so that all ranks have as many. Rank r gets the
    records r, r + num_replicas, and so on; a subclass must keep this order.

    Args:
        loader: the data loader.
        batch_idx: the number of the batch, from 0.

    Returns:
        As `real_records`; None if the loader has no such sampler, or makes its batches otherwise.
    """
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or not size:
        return None
    before, dataset = batch_idx * size, cast(Sized, sampler.dataset)
    mine = len(range(sampler.rank, len(dataset), sampler.num_replicas))
    size = min(size, sampler.num_samples - before)
    return min(max(mine - before, 0), size), size


def repeats_unseen(loader: Any, accelerator: Any) -> bool:
    """Whether accelerate may repeat records of a stream without a known length.

    Args:
        loader: the data loader of the evaluation.
        accelerator: the `Accelerator` that prepared it.
    """
    from accelerate.data_loader import IterableDatasetShard

    stream = isinstance(getattr(loader, "dataset", None), IterableDatasetShard)
    return stream and accelerator.num_processes > 1


def first_records(
    batch: BatchChannels, values: TokenValues, count: int, per_rank: int
) -> tuple[BatchChannels, TokenValues] | None:
    """Keep the first records of a batch. Nothing is read from the device.

    Args:
        batch: the channels.
        values: the values of its tokens, [B, S] or flattened.
        count: how many records to keep.
        per_rank: how many records the batch has.

    Returns:
        The channels and values without the other records; None if a record is neither a row nor
        a sequence, so that they cannot be told apart.
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
        # Without bounds every row counts as one sample, so the other rows must go.
        return _picked(batch, torch.arange(count, device="cpu")), kept.map(
            lambda rows: rows[:count]
        )
    # Sequences behind the end become empty. They have no tokens and count no samples.
    return replace(batch, cu_seqlens=bounds.clamp(max=end)), kept


def _in_order_of_records(
    batch: BatchChannels, records: Tensor, values: TokenValues
) -> tuple[BatchChannels, TokenValues]:
    """Put the rows or sequences back into the order of the records."""
    order = records.argsort()
    batch = replace(_picked(batch, order), records=None)
    shape, bounds = values.mask.shape, batch.cu_seqlens
    if shape[0] == len(order) and len(shape) == 2:
        return batch, values.map(lambda rows: rows[order])
    assert bounds is not None
    # Tokens move with their sequence. Those behind the last bound stay at the end.
    ranks = torch.nn.functional.pad(records, (0, 1), value=len(order))
    moved = ranks[sequence_index(bounds, values.mask.numel())].argsort(stable=True)
    bounds = torch.nn.functional.pad(bounds.diff()[order].cumsum(0), (1, 0)).to(bounds.dtype)
    return replace(batch, cu_seqlens=bounds), values.map(lambda t: t.flatten()[moved].view(shape))


def _picked(batch: BatchChannels, chosen: Tensor) -> BatchChannels:
    """Some of the sequences of a batch, by number."""

    def of(held: Tensor | None) -> Tensor | None:
        return None if held is None else held[chosen]

    given = batch.channels
    found = given[chosen] if isinstance(given, Tensor) else [given[i] for i in chosen.tolist()]
    return replace(
        batch, channels=found, reference=of(batch.reference), record_ids=of(batch.record_ids)
    )
