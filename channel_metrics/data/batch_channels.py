"""The keys that the collator adds to a batch. They are taken out before the model sees it."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from channel_metrics.core.places import Places, places
from channel_metrics.core.sums import TokenValues
from channel_metrics.data.batch_layout import WHOLE_KEY
from channel_metrics.data.carried import RECORD_IDS_KEY
from channel_metrics.data.collator import BOUNDS_KEY, RECORDS_KEY
from channel_metrics.data.collator_fault import CollatorFault
from channel_metrics.data.dispatched import REMEDY, current_dispatcher
from channel_metrics.data.reference import REFERENCE_KEY, numbers_of
from channel_metrics.data.token_marks import MARKS_KEY
from channel_metrics.errors import ChannelError

__all__ = ["COLUMNS_KEY", "BatchChannels", "check_not_cut", "take_channels"]

# The columns of the records, if none of them may hold a channel.
COLUMNS_KEY = "channel_columns"


@dataclass(frozen=True)
class BatchChannels:
    """The channels of a batch, and where its sequences are.

    Args:
        channels: one name or id per sequence, or ids of the targets, int64 [B, S] (see `parallel`).
        cu_seqlens: boundaries of the sequences, int32 [num_sequences + 1]; None if every row is
            one sequence.
        records: int64, the index of the record in each row or sequence; None if they are in order.
        columns: the columns of the records, if none of them may hold a channel; else none.
        reference: float64 [num_sequences, 2], nll and tokens of a reference model; None if there
            is none.
        sequences: the boundaries of the sequences, if those of `cu_seqlens` are shorter: the runs
            of one channel.
        attention_mask: that of the batch, if it has one and no encoder.
        marks: the labels of the tokens from columns of the records, int64 [B, S], each at the
            position of its label. If there is one id per token, at that of the id.
        places: where the tokens of the labels stand, if this does not follow from the boundaries.
        record_ids: int64 [num_sequences, ID_WORDS], see `core.extremes`; None if not needed.
    """

    channels: Tensor | list[str | None]
    cu_seqlens: Tensor | None
    records: Tensor | None = None
    columns: Sequence[str] = ()
    reference: Tensor | None = None
    sequences: Tensor | None = None
    attention_mask: Any = None
    marks: Tensor | None = None
    places: Places | None = None
    record_ids: Tensor | None = None

    @property
    def per_token(self) -> bool:
        """Whether there is one id per token."""
        return isinstance(self.channels, Tensor) and self.channels.dim() == 2

    @property
    def num_sequences(self) -> int:
        """The number of sequences; the number of rows if there is one id per token."""
        return len(self.channels)

    def with_places(self, values: TokenValues) -> TokenValues:
        """The values of its tokens, each at the position of its label, with places and marks."""
        shape, mask = values.mask.shape, self.attention_mask
        if self.marks is not None:
            marks = self.marks.to(values.mask.device, non_blocking=True)
            values = values._replace(marks=marks.view(shape))
        if self.per_token or self.places is not None:
            return values._replace(places=self.places)
        keep = mask != 0 if isinstance(mask, Tensor) and mask.shape == shape else None
        bounds = self.cu_seqlens if self.sequences is None else self.sequences
        return values._replace(places=places(shape, bounds, keep, values.mask))


def take_channels(inputs: MutableMapping[str, Any]) -> BatchChannels | CollatorFault | None:
    """Remove our keys from a batch.

    Args:
        inputs: the batch, which is changed.

    Returns:
        What the keys held, or the fault of the collator; None if there are no channels.
    """
    channels, cu_seqlens = inputs.pop("channels", None), inputs.pop(BOUNDS_KEY, None)
    records, columns = inputs.pop(RECORDS_KEY, None), inputs.pop(COLUMNS_KEY, ())
    reference = numbers_of(inputs.pop(REFERENCE_KEY, None))
    sequences, marks = inputs.pop(WHOLE_KEY, None), inputs.pop(MARKS_KEY, None)
    ids = inputs.pop(RECORD_IDS_KEY, None)
    if channels is None or isinstance(channels, CollatorFault):
        return channels
    mask = None if "decoder_input_ids" in inputs else inputs.get("attention_mask")
    of_batch = channels, cu_seqlens, records, columns, reference, sequences, mask, marks
    return BatchChannels(*of_batch, record_ids=ids)


def check_not_cut(batch: BatchChannels) -> None:
    """Raise `ChannelError` if accelerate has cut the boundaries as if they were rows."""
    bounds = batch.cu_seqlens
    if bounds is None or len(bounds) == batch.num_sequences + 1 or current_dispatcher() is None:
        return
    raise ChannelError(
        f"a batch of {batch.num_sequences} channels has {len(bounds)} boundaries: accelerate reads "
        "the data on one process and cuts packed or flattened batches as if each sequence were a "
        f"row. {REMEDY}."
    )
