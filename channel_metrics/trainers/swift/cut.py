"""Channels for labels that ms-swift has cut: to supervised tokens, or to parts of the rows.

Letters: B rows, S row length, N = num_sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from swift.sequence_parallel import sequence_parallel
from torch import Tensor

from channel_metrics.core.boundaries import rows_as_sequences, token_channel_ids
from channel_metrics.core.labels import UNLABELED_ID, LabelTable
from channel_metrics.core.places import places
from channel_metrics.data.batch_channels import BatchChannels
from channel_metrics.trainers.swift.collator import text_positions

__all__ = ["ids_of_this_part", "kept_bounds", "with_kept_places"]


def kept_bounds(cu_seqlens: Tensor, kept: Tensor | int, num_labels: int) -> Tensor:
    """The boundaries [N + 1] in the labels that ms-swift has kept of one row.

    Args:
        cu_seqlens: [N + 1], the boundaries in the whole row.
        kept: the positions whose logits the model computes, bool [S], or the number of the last
            positions.
        num_labels: the number of labels that were kept. The first is -100 and predicts nothing.
    """
    if not isinstance(kept, Tensor):
        # The last labels of the row were kept.
        return (cu_seqlens - (cu_seqlens[-1] - num_labels)).clamp(min=0)
    # Position p is predicted at p - 1, so the kept labels before p are the kept positions before
    # p - 1, after one label for the start.
    before = torch.nn.functional.pad(kept.to(cu_seqlens).cumsum(0, dtype=cu_seqlens.dtype), (1, 0))
    bounds = 1 + before[(cu_seqlens.long() - 1).clamp(min=0)]
    return torch.where(cu_seqlens > 0, bounds, 0).to(cu_seqlens)


def with_kept_places(batch: BatchChannels, kept: Tensor | int, inputs: Any) -> BatchChannels:
    """The batch with places and marks of the labels that ms-swift has kept, see `kept_bounds`.

    Nothing waits for the device.
    """
    tokens, num_labels = inputs["input_ids"], inputs["labels"].shape[-1]
    mask = batch.attention_mask
    keep = mask != 0 if isinstance(mask, Tensor) and mask.shape == tokens.shape else None
    found = places(tokens.shape, batch.cu_seqlens, keep, tokens)
    labels = torch.arange(tokens.shape[-1], device=tokens.device)[-num_labels:]
    if isinstance(kept, Tensor):
        # In order: the kept positions come first, each before the label that it predicts.
        predicting = (~kept.bool()).to(torch.uint8).argsort(stable=True)[: num_labels - 1]
        labels = torch.nn.functional.pad(predicting + 1, (1, 0)).clamp(max=tokens.shape[-1] - 1)
    marks = batch.marks
    if marks is not None:
        marks = marks.to(tokens.device, non_blocking=True)[..., labels]
    return replace(batch, places=found.map(lambda one: one[..., labels]), marks=marks)


def ids_of_this_part(labels: LabelTable, batch: BatchChannels, inputs: Any) -> Tensor:
    """The channel ids of the targets in this rank's part of the rows, [B, part of S]."""
    tokens = inputs["input_ids"]
    channels = batch.channels
    if not isinstance(channels, Tensor):
        channels = torch.tensor(labels.ids(channels), dtype=torch.int64, device=tokens.device)
    bounds = batch.cu_seqlens
    if bounds is None:
        bounds = rows_as_sequences(*tokens.shape).to(tokens.device)
    ids = token_channel_ids(channels, bounds, tokens.numel()).view(tokens.shape)
    # The ids are passed as labels, so they are padded, shifted and cut like the labels.
    cut: Tensor = sequence_parallel.pad_and_split_inputs(
        None, None, ids, None, None, None, real_position_ids=text_positions(inputs)
    )[2]
    # It pads labels with -100.
    return cut.clamp(min=UNLABELED_ID)
