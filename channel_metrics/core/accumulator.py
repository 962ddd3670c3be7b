"""`ChannelLossAccumulator`: sums per channel over micro-batches; ratios are taken once, at the end.

    >>> import torch
    >>> acc = ChannelLossAccumulator(["bbu", "rru"])
    >>> _ = acc.update(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), channels=["bbu", "rru"])
    >>> acc.compute()["bbu_loss"], acc.compute()["rru_loss"]
    (2.0, 6.0)

An accumulator is a commutative monoid: a new one is the identity, `merge_state` adds, and any
split of the data into updates, in any order, gives the same sums.

Letters: B rows, S row length, T = num_tokens, N = num_sequences, C channels, K columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.checks import can_read, check_ids, check_layout, token_values
from channel_metrics.core.host_sums import sums_if_finite
from channel_metrics.core.labels import UNLABELED, ChannelTable, metric_key
from channel_metrics.core.metrics import DEFAULT_METRICS, channel_values, check_metrics
from channel_metrics.core.sums import (
    COLUMNS,
    NUM_COLUMNS,
    sequence_sums,
    table_rows,
    token_sums,
)
from channel_metrics.errors import ChannelError, ChannelMetricsError
from channel_metrics.ranks.agreed_names import AgreedNames

__all__ = ["ChannelLossAccumulator"]

_STATE_VERSION = 1
_NLL, _NONFINITE = COLUMNS.index("nll"), COLUMNS.index("nonfinite")


class ChannelLossAccumulator:
    """Exact sums of token statistics per channel.

    channels: a `ChannelTable`, or names for a new one. A table that is shared grows for all.
    metrics: what `compute` returns, see `channel_metrics.core.metrics`.
    device: where the sums live; updates are expected there.
    dtype: float64, or float32 for devices without float64 (MPS). In float32 the sums of one
        update carry float32 rounding; the running sums keep the lost bits in a second tensor
        (Knuth's two-sum), so counters do not stop at 2**24.
    """

    def __init__(
        self,
        channels: ChannelTable | Iterable[str] = (),
        *,
        metrics: Sequence[str] = DEFAULT_METRICS,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        device = torch.device(device)
        self.table = channels if isinstance(channels, ChannelTable) else ChannelTable(channels)
        self.metrics = check_metrics(metrics)
        self.dtype = dtype or (torch.float32 if device.type == "mps" else torch.float64)
        # Names that all ranks of a group are known to share; kept by `sync`.
        self.agreed_names = AgreedNames()
        # Tensors made in inference mode could not be added to outside of it.
        with torch.inference_mode(False):
            size = (NUM_COLUMNS, len(self.table) + 1)
            self._sums = torch.zeros(size, dtype=self.dtype, device=device)
            self._lost = torch.zeros_like(self._sums)
            self._mismatch = torch.zeros((), dtype=self.dtype, device=device)
        self._views: dict[int, Tensor] = {}

    @classmethod
    def of_sums(
        cls, channels: ChannelTable, sums: Tensor, *, metrics: Sequence[str], mismatch: float
    ) -> ChannelLossAccumulator:
        """An accumulator on the host that holds `sums`, float64 [C + 1, K] as `sums()` has them."""
        made = cls(channels, metrics=metrics)
        made._sums.copy_(sums.t())
        made._mismatch.fill_(mismatch)
        return made

    @property
    def num_columns(self) -> int:
        """K."""
        return NUM_COLUMNS

    @property
    def device(self) -> torch.device:
        """Where the sums live."""
        return self._sums.device

    def update(
        self,
        token_losses: Tensor,
        *,
        channels: Tensor | Sequence[str | None],
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        correct: Tensor | None = None,
        weights: Tensor | None = None,
        reported_sum: Tensor | None = None,
    ) -> ChannelLossAccumulator:
        """Add one micro-batch.

        token_losses: [T] or [B, S], raw nll in nats of the token at each position.
        channels: ids (int64 [N]) or names, one per sequence in the order of the boundaries; or
            ids of the shape of token_losses, one per token, for sharded layouts.
        cu_seqlens: int32 [N + 1] over the flattened token axis. Without it, [B, S] means one
            sequence per row and [T] means one sequence.
        labels: the token that each loss is about; -100 is not supervised. loss_mask: 0 where
            not supervised. Both may be given. Losses of an unshifted causal model are moved
            first, see `boundaries.to_target_frame`.
        correct: bool, whether the target was predicted. weights: per token, for weighted_loss.
            All of the shape of token_losses.
        reported_sum: the sum of nll that the trainer itself computed on these tokens; the
            largest relative difference to the sums here is kept as `mismatch`.

        With ids, nothing is read back from the device. Raises `ChannelError` and
        `BoundaryError`, naming the argument, what was expected, and what came.
        """
        values = token_values(token_losses, labels, loss_mask, correct, weights)
        ids, lowest = self._channel_ids(channels, token_losses.device)
        # One id for one token of shape [1] is the id of a sequence: without bounds, [T] is one.
        per_token = cu_seqlens is None and ids.shape == token_losses.shape and ids.shape != (1,)
        layout = None if per_token else check_layout(values.losses, ids, cu_seqlens)
        # On the host, losses are taken to be finite, and looked at only if their sums are not.
        on_host = can_read(token_losses)
        sums = sums_if_finite(values, cu_seqlens, layout, self.dtype) if on_host else None
        if sums is None and per_token:
            sums = token_sums(values, self.dtype)
        elif sums is None:
            sums = sequence_sums(values, cu_seqlens, self.dtype)
        self._add_rows(sums, ids.flatten() if per_token else ids, lowest)
        if reported_sum is not None:
            self._compare(sums, reported_sum)
        return self

    def merge_state(self, others: Iterable[ChannelLossAccumulator]) -> ChannelLossAccumulator:
        """Add the sums of `others`, whose channels are matched by name.

        Nothing is read back from the device for those that share this table and device.
        """
        for other in others:
            same_kind = (other.device, other.dtype) == (self.device, self.dtype)
            if other.table is self.table and same_kind:
                self._merge_same_table(other)
            else:
                self._load_rows(other.table.names, other.sums())
            worst = torch.maximum(self._mismatch, other._mismatch.to(self._mismatch))
            self._mismatch.copy_(worst)
        return self

    def compute(self) -> dict[str, float]:
        """The metrics of all channels that have tokens, under their log keys."""
        return {
            metric_key(self.table.key_format, channel, metric): value
            for channel, values in self.compute_by_channel().items()
            for metric, value in values.items()
        }

    def compute_by_channel(self) -> dict[str, dict[str, float]]:
        """{channel: {metric: value}} for the channels that have tokens, `unlabeled` last."""
        # `unlabeled` is the first row, and comes last.
        names, sums = (*self.table.names, UNLABELED), self.sums().roll(-1, dims=0)
        tokens = sums[:, COLUMNS.index("tokens")]
        with_tokens = (tokens > 0).nonzero().flatten()
        total = float(tokens.sum())
        return {
            names[index]: channel_values(dict(zip(COLUMNS, row, strict=True)), total, self.metrics)
            for index, row in zip(with_tokens.tolist(), sums[with_tokens].tolist(), strict=True)
        }

    def mismatch(self) -> float:
        """The largest relative difference to a `reported_sum` since the last reset."""
        return float(self._mismatch)

    def sums(self) -> Tensor:
        """float64 [C + 1, K] on the host: row 0 unlabeled, row i + 1 channel i. One sync."""
        rows = len(self.table) + 1
        exact = self._sums.cpu().double() + self._lost.cpu().double()
        return torch.nn.functional.pad(exact, (0, rows - exact.shape[1])).t().contiguous()

    def reset(self) -> ChannelLossAccumulator:
        """Forget the sums, keep the names."""
        for state in (self._sums, self._lost, self._mismatch):
            state.zero_()
        return self

    def to(self, device: torch.device | str) -> ChannelLossAccumulator:
        """Move the sums to `device`."""
        self._sums, self._lost = self._sums.to(device), self._lost.to(device)
        self._mismatch = self._mismatch.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Names and sums as plain values and one host tensor; survives a change of ids."""
        return {
            "version": _STATE_VERSION,
            "columns": list(COLUMNS),
            "names": list(self.table.names),
            "sums": self.sums(),
            "mismatch": self.mismatch(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> ChannelLossAccumulator:
        """Replace the sums by those of `state_dict()`; channels are matched by name."""
        if state.get("version") != _STATE_VERSION or state.get("columns") != list(COLUMNS):
            raise ChannelMetricsError(
                f"the state must have version {_STATE_VERSION} and columns {list(COLUMNS)}, but "
                f"has version {state.get('version')!r} and columns {state.get('columns')}; it "
                "was written by another version of channel_metrics."
            )
        self.reset()
        self._load_rows(state["names"], state["sums"])
        self._mismatch.fill_(state["mismatch"])
        return self

    def _rows(self) -> int:
        missing = len(self.table) + 1 - self._sums.shape[1]
        if missing > 0:
            with torch.inference_mode(False):
                self._sums = torch.nn.functional.pad(self._sums, (0, missing))
                self._lost = torch.nn.functional.pad(self._lost, (0, missing))
        return self._sums.shape[1]

    def _add_rows(self, sums: Tensor, ids: Tensor, lowest: int | None) -> None:
        """lowest: see `check_ids`."""
        size = self._rows()
        if self.dtype != torch.float64:
            rows = table_rows(ids, size, sums.shape[1], checked=lowest is not None)
            self._add(sums.new_zeros(len(sums), size).index_add_(1, rows, sums))
        # Else straight into the table: what this costs does not grow with it.
        elif lowest is not None and lowest >= 0 and sums.shape[1] == ids.numel():
            self._labeled(sums.shape[0]).index_add_(1, ids, sums)
        else:
            rows = table_rows(ids, size, sums.shape[1], checked=lowest is not None)
            self._sums[: len(sums)].index_add_(1, rows, sums)

    def _labeled(self, num_columns: int) -> Tensor:
        """[num_columns, C] of the sums: row 0, `unlabeled`, is left out."""
        view = self._views.get(num_columns)
        if view is None or view._base is not self._sums:
            # Kept: it takes as long to make as to add to.
            view = self._views[num_columns] = self._sums[:num_columns, 1:]
        return view

    def _add(self, added: Tensor) -> None:
        """`added` [K, C + 1] may leave out the last columns."""
        sums, lost = (state.narrow(0, 0, len(added)) for state in (self._sums, self._lost))
        if self.dtype == torch.float64:
            sums += added
            return
        total = sums + added
        other = total - sums
        lost += (sums - (total - other)) + (added - other)
        sums.copy_(total)

    def _compare(self, sums: Tensor, reported_sum: Tensor) -> None:
        of_all = sums.sum(1)
        nll, reported = of_all[_NLL], reported_sum.detach().to(sums)
        off = (nll - reported).abs() / torch.maximum(nll.abs(), reported.abs())
        # Not finite where both are 0, or where the trainer's own sum is (a mean over no tokens).
        off = torch.nan_to_num(off, nan=0, posinf=0)
        if len(of_all) > _NONFINITE:
            off = off * (of_all[_NONFINITE] == 0)
        torch.maximum(self._mismatch, off, out=self._mismatch)

    def _merge_same_table(self, other: ChannelLossAccumulator) -> None:
        missing = self._rows() - other._sums.shape[1]
        for part in (other._sums, other._lost):
            self._add(torch.nn.functional.pad(part, (0, missing)))

    def _load_rows(self, names: Sequence[str], sums: Tensor) -> None:
        rows = [0, *(self.table.add(name) + 1 for name in names)]
        size = self._rows()
        index = torch.tensor(rows, device=self.device)
        rounded = sums.to(self.dtype)
        # What float32 cannot hold in one number, it holds in two.
        for part in (rounded, sums - rounded):
            moved = part.to(self._sums)
            self._add(moved.new_zeros(NUM_COLUMNS, size).index_add_(1, index, moved.t()))

    def _channel_ids(
        self, channels: Tensor | Sequence[str | None], device: torch.device
    ) -> tuple[Tensor, int | None]:
        """Ids, and the lowest of them where known, see `check_ids`."""
        if not isinstance(channels, Tensor):
            if isinstance(channels, str):
                raise ChannelError(
                    f"channels must be one name per sequence, but is the string {channels!r}; "
                    "pass a list."
                )
            ids = self.table.ids(channels)
            return torch.tensor(ids, dtype=torch.int64, device=device), min(ids, default=0)
        return channels, check_ids(channels, len(self.table))
