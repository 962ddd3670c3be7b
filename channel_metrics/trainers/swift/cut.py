"""Channels after ms-swift has cut the labels: to what is supervised, or to parts of the rows.

Letters: B rows, S row length, N = num_sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from swift.sequence_parallel import sequence_parallel
from torch import Tensor

from channel_metrics.core.boundaries import rows_as_sequences, token_channel_ids
from channel_metrics.core.labels import UNLABELED_ID, LabelTable
from channel_metrics.trainers.hf.batch import BatchChannels

__all__ = ["ids_of_this_part", "kept_bounds"]


def kept_bounds(cu_seqlens: Tensor, kept: Tensor | int, num_labels: int) -> Tensor:
    """Boundaries [N + 1] in the labels that are left of one row.

    kept: bool [S], the positions whose logits the model computes, or the number of the last
    positions. num_labels: the labels that are left; the first one is -100, the target of nothing.
    """
    if not isinstance(kept, Tensor):
        # The labels that are left are the last ones of the row.
        return (cu_seqlens - (cu_seqlens[-1] - num_labels)).clamp(min=0)
    # Position p is the target of p - 1: as many targets are left before p as positions before it.
    before = torch.nn.functional.pad(kept.to(cu_seqlens).cumsum(0, dtype=cu_seqlens.dtype), (1, 0))
    bounds = 1 + before[(cu_seqlens.long() - 1).clamp(min=0)]
    return torch.where(cu_seqlens > 0, bounds, 0).to(cu_seqlens)


def ids_of_this_part(labels: LabelTable, batch: BatchChannels, inputs: Any) -> Tensor:
    """[B, part of S] ids of the targets, of the part of the rows that this rank has."""
    tokens = inputs["input_ids"]
    channels = batch.channels
    if not isinstance(channels, Tensor):
        channels = torch.tensor(labels.ids(channels), dtype=torch.int64, device=tokens.device)
    bounds = batch.cu_seqlens
    if bounds is None:
        bounds = rows_as_sequences(*tokens.shape).to(tokens.device)
    ids = token_channel_ids(channels, bounds, tokens.numel()).view(tokens.shape)
    positions = inputs.get("text_position_ids")
    positions = inputs.get("position_ids") if positions is None else positions
    # Given as labels, they are padded, shifted and cut as labels are.
    cut: Tensor = sequence_parallel.pad_and_split_inputs(
        None, None, ids, None, None, None, real_position_ids=positions
    )[2]
    # Its padding for labels is -100.
    return cut.clamp(min=UNLABELED_ID)
