"""`ChannelLossAccumulator` adds up token statistics per channel. `compute` divides once.

    >>> import torch
    >>> acc = ChannelLossAccumulator(["bbu", "rru"])
    >>> _ = acc.update(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), channels=["bbu", "rru"])
    >>> acc.compute()["bbu_loss"], acc.compute()["rru_loss"]
    (2.0, 6.0)

The sums do not depend on how the data is split into updates, nor on their order. `merge_state`
adds the sums of other accumulators, and a new accumulator holds zeros.

Letters: B rows, S row length, T = num_tokens, N = num_sequences, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from channel_metrics.core.checks import (
    can_read,
    channels_shape,
    check_layout,
    check_record_ids,
    check_scalar,
    checked_reference,
    has_id_per_token,
    token_values,
)
from channel_metrics.core.extremes import Extremes, first_tokens
from channel_metrics.core.keys import ChannelTable, metric_key
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.percentiles import BINS, sequence_bins
from channel_metrics.core.rows import table_rows
from channel_metrics.core.schema import DEFAULT_METRICS, TOKENS, Schema
from channel_metrics.core.sums import TokenView, sequence_sums, token_sums
from channel_metrics.core.table import SumTable, values_by_channel
from channel_metrics.core.text_sizes import TextSizes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ChannelLossAccumulator"]


class ChannelLossAccumulator(SumTable):
    """Exact sums of token statistics per channel.

    Args:
        channels: a label table, or names for a new one. A name that joins a shared table joins
            for all who share it.
        metrics: the names of the metrics that `compute` returns, see `channel_metrics.core.schema`.
        device: where the sums are kept. The tensors of an update must be there.
        dtype: of the sums, see `SumTable`.
        schema: the columns and metrics; by default the registered ones.

    Attributes:
        in_parts: whether an update could not fill the columns that need whole sequences and
            float64. Their metrics are then absent.
        extremes: keeps the sequences with the highest and the lowest loss; None keeps none.
        text_sizes: the bytes and characters of the tokens. Without them, or if an update has no
            labels, metrics per byte do not count its tokens.

    Raises:
        ConfigError: for an unknown metric, or a dtype that `SumTable` refuses.
        ChannelError: for a name that must not join the table.
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
        self.metrics = schema.check(metrics, schema.window_metrics)
        # A copy, because columns may be registered later: these are for later accumulators.
        self.schema = schema = schema.narrowed(self.metrics)
        self.in_parts = False
        self.text_sizes: TextSizes | None = None
        self.extremes: Extremes | None = None
        labels = channels if isinstance(channels, LabelTable) else ChannelTable(channels)
        super().__init__(labels, schema.column_names, device=device, dtype=dtype)

    @classmethod
    def of_sums(
        cls,
        channels: LabelTable,
        sums: Tensor,
        *,
        metrics: Sequence[str],
        mismatch: float,
        schema: Schema = TOKENS,
    ) -> ChannelLossAccumulator:
        """An accumulator on the host that holds the given sums.

        Args:
            channels: the names of the channels.
            sums: float64 [C + 1, K], in the form that `sums()` returns.
            metrics: what `compute` returns.
            mismatch: what `mismatch()` returns.
            schema: the columns of `sums`.
        """
        made = cls(channels, metrics=metrics, schema=schema)
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
        entropy: Tensor | None = None,
        reported_sum: Tensor | None = None,
        reference: Tensor | None = None,
        record_ids: Tensor | None = None,
        groups: Sequence[Tensor] = (),
    ) -> ChannelLossAccumulator:
        """Add one micro-batch. If an argument is refused, nothing is added.

        If channels are ids, nothing is read back from the device.

        Args:
            token_losses: [T] or [B, S], the nll of the token at each position in nats, before
                weights and scaling.
            channels: int64 ids [N] or names, one per sequence in the order of the boundaries. For
                sharded layouts: ids of the shape of token_losses, one per token.
            cu_seqlens: int32 [N + 1] over the flattened token axis. Without it, each row of
                [B, S] is one sequence, and [T] is one sequence.
            labels: the token id that each loss is about; -100 is not supervised. If position t
                holds the loss of token t + 1, call `boundaries.to_target_frame` on the losses
                first.
            loss_mask: 0 where not supervised. It may be given together with labels.
            correct: bool, whether the target was predicted.
            weights: float, one per token, for `weighted_loss`.
            entropy: float, in nats, of the distribution that predicted the token. labels,
                loss_mask, correct, weights and entropy have the shape of token_losses.
            reported_sum: a tensor of one number, the sum of nll that the trainer computed on
                these tokens. `mismatch` keeps the largest relative difference from our sum.
            reference: float64 [N, 2], the nll and the tokens of a reference model in each
                sequence, for `excess_loss`; NaN if not known.
            record_ids: int64 [N, ID_WORDS], see `channel_metrics.core.extremes`.
            groups: for each token axis the ids of its rows, int64 of the shape of token_losses,
                see `channel_metrics.core.token_axes`. The tokens are added to these rows too.

        Returns:
            This accumulator.

        Raises:
            ChannelError: the channels do not fit the sequences, or a name is refused.
            BoundaryError: cu_seqlens is no list of bounds over these tokens.
            ChannelMetricsError: another tensor has the wrong type or shape.
        """
        values = token_values(token_losses, labels, loss_mask, correct, weights, entropy=entropy)
        if labels is not None and self.text_sizes is not None and "text_nll" in self._place:
            num_bytes, num_chars = self.text_sizes.of(labels)
            values = values._replace(num_bytes=num_bytes, num_chars=num_chars)
        if reported_sum is not None:
            check_scalar("reported_sum", reported_sum)
        shape = channels_shape(channels)
        per_token = has_id_per_token(token_losses.shape, shape, cu_seqlens, reference, record_ids)
        in_parts = per_token or self.dtype != torch.float64
        columns = [column for column in self.schema.columns if not (in_parts and column.whole)]
        self.in_parts |= len(columns) < len(self.schema.columns)
        if not per_token:
            check_layout(values.losses, shape, cu_seqlens)
            check_record_ids(record_ids, shape.numel())
            if reference is not None:
                reference = checked_reference(reference, shape.numel(), self.device)
        view = TokenView(values, self.dtype)
        of_tokens = token_sums(view, columns=columns) if per_token or groups else {}
        sums = of_tokens
        if not per_token:
            sums = sequence_sums(view, cu_seqlens, columns=columns, reference=reference)
        # Names join the table here, so all checks must come before this line.
        ids = self._ids(channels)
        self._add(ids, sums)
        if BINS[0] in self._place and not in_parts:
            self._add_bins(ids, sums)
        if self.extremes is not None and per_token:
            self.extremes.lacks_sequences = True
        elif self.extremes is not None:
            tokens = None
            if labels is not None and self.extremes.num_text:
                tokens = first_tokens(labels, view.mask, cu_seqlens, self.extremes.num_text)
            width, size = self._num_rows(), sums["tokens"].numel()
            rows = table_rows(ids.flatten(), width, size, checked=can_read(ids))
            self.extremes.add(rows, sums, record_ids, tokens, width)
        for group in groups:
            self._add(group, of_tokens)
        if reported_sum is not None:
            nll = sums["nll"].sum()
            if "nonfinite" in sums:
                # Our sum leaves out losses that are not finite, but the trainer's sum has them.
                nll = nll.where(sums["nonfinite"].sum() == 0, torch.nan)
            self.compare(nll, reported_sum)
        return self

    def _add_bins(self, ids: Tensor, sums: dict[str, Tensor]) -> None:
        """Count each sequence in the bin of its mean loss: one scatter for all columns of bins."""
        bins, used = sequence_bins(sums)
        width = self._num_rows()
        rows = table_rows(ids.flatten(), width, used.numel(), checked=can_read(ids))
        places = (self._place[BINS[0]] + bins) * width + rows
        self._sums.view(-1).scatter_add_(0, places, used.to(self.dtype))

    def merge(self, other: SumTable) -> None:
        """Add the sums of another table, see `SumTable`, and its most extreme sequences."""
        super().merge(other)
        of_other = getattr(other, "extremes", None)
        if self.extremes is not None and of_other is not None and other.labels is self.labels:
            self.extremes.merge(of_other)

    def reset(self) -> Self:
        """Set the sums to zero and keep the names."""
        if self.extremes is not None:
            self.extremes.reset()
        return super().reset()

    def merge_state(self, others: Iterable[ChannelLossAccumulator]) -> ChannelLossAccumulator:
        """Add the sums of `others`. Channels are matched by name.

        Nothing is read back from the device for accumulators with the same table and device.

        Returns:
            This accumulator.
        """
        for other in others:
            self.merge(other)
        return self

    def compute(self) -> dict[str, float]:
        """{log key: value}: the metrics of all channels that have tokens."""
        key_format = getattr(self.labels, "key_format", "{channel}_{metric}")
        return {
            metric_key(key_format, channel, metric): value
            for channel, values in self.compute_by_channel().items()
            for metric, value in values.items()
        }

    def compute_by_channel(self) -> dict[str, dict[str, float]]:
        """{channel: {metric: value}} of the channels that have tokens; `unlabeled` comes last."""
        chosen = self.schema.chosen(self.metrics)
        return values_by_channel(self.schema, self.labels.names, self.sums(), chosen)
