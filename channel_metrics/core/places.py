"""Where each token stands in its sequence, and the buckets of the axes `position` and `length`.

>>> [bucket_name(number) for number in (0, 1, 2, 8)]
['0000000', '0000001', '0000002-0000003', '0000128-0000255']

Letters: B rows, S row length, T = num_tokens, N = num_sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from channel_metrics.core.cu_seqlens import sequence_index

__all__ = ["NUM_BUCKETS", "Places", "bucket_name", "buckets", "places", "places_of_positions"]

# 0, 1, 2 to 3, 4 to 7, ..., and one for all from 2**20 on.
NUM_BUCKETS = 22


class Places(NamedTuple):
    """Where each token stands. Both tensors are int64, in one shape.

    Attributes:
        positions: how many tokens of its sequence are before it; -1 if it is in no sequence.
        lengths: how many tokens its sequence has; -1 if it is in no sequence.
    """

    positions: Tensor
    lengths: Tensor

    def map(self, moved: Callable[[Tensor], Tensor]) -> Places:
        """The places after `moved` was applied to each tensor."""
        return Places(*map(moved, self))

    def of_next(self) -> Places:
        """At each position the place of the next token of its row, which it predicts."""
        after = self.positions[..., -1:]
        last = Places(after + (after >= 0), self.lengths[..., -1:])
        pairs = zip(self, last, strict=True)
        return Places(*(torch.cat([one[..., 1:], end], dim=-1) for one, end in pairs))


def places(
    shape: torch.Size, cu_seqlens: Tensor | None, keep: Tensor | None, like: Tensor
) -> Places:
    """Where each token stands in its sequence. Shapes are static, and nothing waits for the device.

    Args:
        shape: [T] or [B, S].
        cu_seqlens: int32 [N + 1] over the flattened token axis. Without it, each row of [B, S] is
            one sequence, and [T] is one sequence.
        keep: bool of this shape, False at pad positions, which are not counted. None: no pads.
        like: a tensor on the device of the result.

    Returns:
        In the shape `shape`. A pad has the place of the token before it.
    """
    size, device = shape.numel(), like.device
    if cu_seqlens is None:
        rows = shape[0] if len(shape) == 2 else 1
        bounds = torch.arange(rows + 1, device=device) * shape[-1]
    else:
        bounds = cu_seqlens.to(device, non_blocking=True).long()
    kept = torch.arange(size + 1, device=device)
    if keep is not None:
        counts = keep.to(device, non_blocking=True).flatten().long().cumsum(0)
        kept = torch.nn.functional.pad(counts, (1, 0))
    before = kept.index_select(0, bounds)
    owner = sequence_index(bounds, size)
    # The tokens past the last bound belong to no sequence.
    starts = torch.nn.functional.pad(before[:-1], (0, 1))
    lengths = torch.nn.functional.pad(before.diff(), (0, 1), value=-1)
    positions = (kept[1:] - 1 - starts.index_select(0, owner)).clamp(min=0)
    outside = owner == len(bounds) - 1
    found = Places(positions.masked_fill(outside, -1), lengths.index_select(0, owner))
    return found.map(lambda one: one.view(shape))


def places_of_positions(position_ids: Tensor) -> Places:
    """Where each token stands, if positions [B, S] count up in a sequence and restart in the next.

    Nothing waits for the device.
    """
    flat = position_ids.flatten().long()
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff() != 1
    owner = starts.flatten().long().cumsum(0) - 1
    lengths = torch.zeros_like(flat).scatter_add_(0, owner, torch.ones_like(flat))[owner]
    at = torch.arange(len(flat), device=flat.device)
    positions = (
        at - torch.zeros_like(flat).scatter_reduce_(0, owner, at, "amin", include_self=False)[owner]
    )
    return Places(positions, lengths).map(lambda one: one.view(position_ids.shape))


def buckets(values: Tensor) -> Tensor:
    """int64: the number of the bucket of each value; -1 for negative ones."""
    # 2**e is in the bucket e + 1. The exponent of a float is that number, and that of 0 is 0.
    exponents = torch.frexp(values.float()).exponent.long().clamp(max=NUM_BUCKETS - 1)
    return exponents.masked_fill(values < 0, -1)


def bucket_name(number: int) -> str:
    """The label of a bucket: its lowest and its highest value, so that names sort as numbers."""
    low, high = (1 << number) >> 1, (1 << number) - 1
    if number == NUM_BUCKETS - 1:
        return f"{low:07}-"
    return f"{low:07}" if low >= high else f"{low:07}-{high:07}"
