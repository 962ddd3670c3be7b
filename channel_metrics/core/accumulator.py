"""`ChannelLossAccumulator`: sums per channel over micro-batches; ratios are taken once, at the end.

    >>> import torch
    >>> acc = ChannelLossAccumulator(["bbu", "rru"])
    >>> _ = acc.update(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), channels=["bbu", "rru"])
    >>> acc.compute()["bbu_loss"], acc.compute()["rru_loss"]
    (2.0, 6.0)

An accumulator is a commutative monoid: a new one is the identity, `merge_state` adds, and any
split of the data into updates, in any order, gives the same sums.

Letters: B rows, S row length, T = num_tokens, N = num_sequences, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from channel_metrics.core.checks import channels_shape, check_layout, check_scalar, token_values
from channel_metrics.core.keys import ChannelTable, metric_key
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.schema import DEFAULT_METRICS, TOKENS, Schema
from channel_metrics.core.sums import sequence_sums, token_sums
from channel_metrics.core.table import SumTable, values_by_channel

__all__ = ["ChannelLossAccumulator"]


class ChannelLossAccumulator(SumTable):
    """Exact sums of token statistics per channel.

    Args:
        channels: a table, or names for a new one. A table that is shared grows for all.
        metrics: what `compute` returns, see `channel_metrics.core.schema`.
        device: where the sums live; updates are expected there.
        dtype: see `SumTable`.
        schema: the columns and metrics; by default those that are registered.
    """

    def __init__(
        self,
        channels: LabelTable | Iterable[str] = (),
        *,
        metrics: Sequence[str] = DEFAULT_METRICS,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        schema: Schema = TOKENS,
    ) -> None:
        # A copy: what is registered later belongs to later accumulators.
        self.schema = schema.extended()
        self.metrics = schema.check(metrics, schema.window_metrics)
        labels = channels if isinstance(channels, LabelTable) else ChannelTable(channels)
        super().__init__(labels, schema.column_names, device=device, dtype=dtype)

    @classmethod
    def of_sums(
        cls, channels: LabelTable, sums: Tensor, *, metrics: Sequence[str], mismatch: float
    ) -> ChannelLossAccumulator:
        """An accumulator on the host that holds `sums`, float64 [C + 1, K] as `sums()` has them."""
        made = cls(channels, metrics=metrics)
        made._sums.copy_(sums.t())
        made._mismatch.fill_(mismatch)
        return made

    @property
    def table(self) -> LabelTable:
        """The names of the channels."""
        return self.labels

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
        """Add one micro-batch: all of it, or nothing if it is refused.

        With ids, nothing is read back from the device.

        Args:
            token_losses: [T] or [B, S], raw nll in nats of the token at each position.
            channels: ids (int64 [N]) or names, one per sequence in the order of the boundaries;
                or ids of the shape of token_losses, one per token, for sharded layouts.
            cu_seqlens: int32 [N + 1] over the flattened token axis. Without it, [B, S] means one
                sequence per row and [T] means one sequence.
            labels: the token that each loss is about; -100 is not supervised. Losses of an
                unshifted causal model are moved first, see `boundaries.to_target_frame`.
            loss_mask: 0 where not supervised. Both it and labels may be given.
            correct: bool, whether the target was predicted.
            weights: per token, for weighted_loss. All of these have the shape of token_losses.
            reported_sum: the sum of nll that the trainer itself computed on these tokens; the
                largest relative difference to the sums here is kept as `mismatch`.

        Raises:
            ChannelError, BoundaryError: naming the argument, what was expected, and what came.
        """
        values = token_values(token_losses, labels, loss_mask, correct, weights)
        if reported_sum is not None:
            check_scalar("reported_sum", reported_sum)
        shape = channels_shape(channels)
        # One id for one token of shape [1] is the id of a sequence: without bounds, [T] is one.
        per_token = cu_seqlens is None and shape == token_losses.shape and shape != (1,)
        if per_token:
            sums = token_sums(values, self.dtype, self.schema.columns)
        else:
            check_layout(values.losses, shape, cu_seqlens)
            sums = sequence_sums(values, cu_seqlens, self.dtype, self.schema.columns)
        # Names may join the table: nothing after this is refused.
        self._add(self._ids(channels), sums)
        if reported_sum is not None:
            nll = sums["nll"].sum()
            if "nonfinite" in sums:
                # A loss that is not finite is left out here, and makes theirs what it is.
                nll = nll.where(sums["nonfinite"].sum() == 0, torch.nan)
            self.compare(nll, reported_sum)
        return self

    def merge_state(self, others: Iterable[ChannelLossAccumulator]) -> ChannelLossAccumulator:
        """Add the sums of `others`, whose channels are matched by name.

        Nothing is read back from the device for those that share this table and device.
        """
        for other in others:
            self.merge(other)
        return self

    def compute(self) -> dict[str, float]:
        """The metrics of all channels that have tokens, under their log keys."""
        key_format = getattr(self.labels, "key_format", "{channel}_{metric}")
        return {
            metric_key(key_format, channel, metric): value
            for channel, values in self.compute_by_channel().items()
            for metric, value in values.items()
        }

    def compute_by_channel(self) -> dict[str, dict[str, float]]:
        """{channel: {metric: value}} for the channels that have tokens, `unlabeled` last."""
        chosen = self.schema.chosen(self.metrics)
        return values_by_channel(self.schema, self.labels.names, self.sums(), chosen)
