"""Sums per channel over samples (preference pairs, completions) instead of tokens.

Columns are named sums; every sample is counted once, by the rank that holds it, and ratios are
taken once per window, over all ranks: see `channel_metrics.ranks.sync`.

Letters: N samples of a micro-batch, C channels, K columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import ChannelTable
from channel_metrics.core.labels import UNLABELED
from channel_metrics.errors import ChannelError
from channel_metrics.ranks.agreed_names import AgreedNames
from channel_metrics.ranks.sync import sum_over_ranks

__all__ = ["ChannelSums", "ratio", "relative_difference", "sums_of_all_ranks"]


class ChannelSums:
    """Sums of named columns per channel, and the worst mismatch to the trainer's own values.

    table: shared, and grows where names are met on the way. The first use decides the device.
    """

    def __init__(self, table: ChannelTable, columns: Sequence[str]) -> None:
        self.table = table
        self.columns = tuple(columns)
        self.agreed_names = AgreedNames()
        self._sums = torch.zeros(1, len(self.columns), dtype=torch.float64)
        self._mismatch = torch.zeros((), dtype=torch.float64)

    @property
    def num_columns(self) -> int:
        """K."""
        return len(self.columns)

    @property
    def device(self) -> torch.device:
        """Where the sums live."""
        return self._sums.device

    @torch.no_grad()
    def add(self, channels: Tensor | Sequence[str | None], values: Mapping[str, Tensor]) -> None:
        """Add N samples: their channels (ids or names), and [N] values of each column.

        A column that is not in `values` gets nothing. Nothing is read from the device.
        """
        width = {name: value.numel() for name, value in values.items()}
        if set(width.values()) != {len(channels)}:
            raise ChannelError(
                f"expected one value per sample and column for {len(channels)} channels, but got "
                f"{width}; samples and channels are out of step."
            )
        first = next(iter(values.values()))
        self._move(first.device)
        ids = channels if isinstance(channels, Tensor) else torch.tensor(self.table.ids(channels))
        zeros = torch.zeros(len(channels), dtype=self._sums.dtype, device=first.device)
        stacked = torch.stack(
            [values[n].to(zeros) if n in values else zeros for n in self.columns], dim=-1
        )
        missing = len(self.table) + 1 - self._sums.shape[0]
        with torch.inference_mode(False):
            self._sums = torch.nn.functional.pad(self._sums, (0, 0, 0, max(missing, 0)))
            self._sums.index_add_(0, ids.to(first.device).long() + 1, stacked)

    @torch.no_grad()
    def compare(self, ours: Tensor, theirs: Tensor) -> None:
        """Keep the largest relative difference of two scalars; nothing is read from the device."""
        self._move(ours.device)
        off = relative_difference(ours.to(self._mismatch), theirs.to(self._mismatch))
        self._mismatch = torch.maximum(self._mismatch, torch.nan_to_num(off, nan=0.0))

    def sums(self) -> Tensor:
        """float64 [C + 1, K] on the host: row 0 unlabeled, row i + 1 channel i."""
        sums = self._sums.cpu().double()
        missing = len(self.table) + 1 - sums.shape[0]
        return torch.nn.functional.pad(sums, (0, 0, 0, missing))

    def mismatch(self) -> float:
        """The largest relative difference since the last reset."""
        return float(self._mismatch)

    def reset(self) -> None:
        """Forget the sums, keep the names."""
        self._sums.zero_()
        self._mismatch.zero_()

    def _move(self, device: torch.device) -> None:
        if self.device != device:
            # MPS has no float64.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._sums = self._sums.to(device, dtype)
            self._mismatch = self._mismatch.to(device, dtype)


def sums_of_all_ranks(
    window: ChannelSums, *, alone: bool = False, guard: FaultGuard | None = None
) -> tuple[dict[str, dict[str, float]], float]:
    """{channel: {column: sum}} for the channels that have samples, `unlabeled` last; mismatch.

    The first column counts the samples. alone, guard: as in `channel_metrics.ranks.sync.sync`.
    """
    names, sums, mismatch = sum_over_ranks(window, alone=alone, guard=guard)
    # `unlabeled` is the first row, and comes last.
    names, sums = (*names, UNLABELED), sums.roll(-1, dims=0)
    with_samples = sums[:, 0].nonzero().flatten().tolist()
    values = sums[with_samples].tolist()
    return {
        names[row]: dict(zip(window.columns, of_row, strict=True))
        for row, of_row in zip(with_samples, values, strict=True)
    }, mismatch


def ratio(numerator: float, denominator: float) -> float | None:
    """None without a denominator."""
    return numerator / denominator if denominator else None


def relative_difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """|a - b| over the larger of the two; 0 for two zeros."""
    scale = torch.maximum(ours.abs(), theirs.abs()).clamp(min=torch.finfo(ours.dtype).tiny)
    return (ours - theirs).abs() / scale
