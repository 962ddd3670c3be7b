"""The channel of each token in Megatron, from the data iterator to the layout of the loss mask.

Ids are read from the batch that the data iterator gives, on the ranks that have one. The function
that cuts the labels for context parallelism is called a second time, with the ids in place of the
labels. So ids and labels are always cut in the same way.

Letters: B rows of the micro-batch, S row length, N sequences of the micro-batch.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.boundaries import token_channel_ids
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.places import Places, places, places_of_positions
from channel_metrics.errors import BoundaryError, ChannelError

__all__ = [
    "BATCH_KEY",
    "CROSSINGS_KEY",
    "NO_SEQUENCE",
    "SEQUENCES_KEY",
    "BatchIds",
    "Tap",
    "current_ids",
]

# Our datasets put the ids under this key: one per row, or one per token.
BATCH_KEY = "channel_ids"
# A pack has the channel of each of its sequences under this key, filled up with NO_SEQUENCE.
SEQUENCES_KEY = "channel_sequences"
NO_SEQUENCE = -2
# A pack has the number of its crossings under this key, see `data.pack_channel_ids`.
CROSSINGS_KEY = "channel_crossings"

# Keys of sequence boundaries in a batch. The padded ones come first: they tell where tokens are.
_BOUNDS_KEYS = (
    "cu_seqlens_padded",
    "cu_seqlens_q_padded",
    "cu_seqlens",
    "cu_seqlens_q",
    "cu_seq_lens_q",
)
_current: contextvars.ContextVar[BatchIds | None] = contextvars.ContextVar(
    "channel_metrics_micro_batch", default=None
)


class BatchIds:
    """The ids of the micro-batch whose forward step runs now.

    Args:
        table: the channels of the run.
        guard: handles errors while the ids are read and cut.
        drop_dataset_id: whether to remove `dataset_id` from the batch, as a cut cannot handle it.
        with_places: whether to find `places`.

    Attributes:
        ids: int64, [B] (one per row), [N] (one per sequence of `cu_seqlens`) or in the shape of
            the labels (one per token); None on ranks without data.
        cu_seqlens: boundaries of the sequences, int32 [N + 1], counted over all rows of the batch.
        rows: the shape [B, S] of the batch; None if no entry shows it.
        sequences: int64 [N], the channel of each sequence. It is never cut.
        places: where the target of each position stands in its sequence, in the shape of the
            labels; None if this was not asked for or is not known.
        labels: the labels, cut as the losses; None if the batch has none.
        is_cut: whether the ids have been cut for context parallelism.
        num_batches: how many batches the forward step has taken.
        num_crossings: how many supervised targets are in the sequence after that of their position.
    """

    def __init__(
        self,
        table: LabelTable,
        guard: FaultGuard,
        *,
        drop_dataset_id: bool = False,
        with_places: bool = False,
    ) -> None:
        self.table = table
        self.guard = guard
        self.ids: Tensor | None = None
        self.cu_seqlens: Tensor | None = None
        self.rows: torch.Size | None = None
        self.sequences: Tensor | None = None
        self.places: Places | None = None
        self.labels: Tensor | None = None
        self.is_cut = False
        self.num_batches = 0
        self.num_crossings = 0
        self._drop_dataset_id = drop_dataset_id
        self._with_places = with_places

    @contextmanager
    def active(self) -> Iterator[BatchIds]:
        """Inside this context, a cut of the labels also cuts these ids."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)

    def read(self, batch: Any) -> Any:
        """Take the ids out of a batch.

        Args:
            batch: what the data iterator gave.

        Returns:
            The batch without the keys that our datasets have added.
        """
        self.num_batches += 1
        if not isinstance(batch, Mapping):
            return batch
        rest = dict(batch)
        ours = {key: rest.pop(key, None) for key in (BATCH_KEY, SEQUENCES_KEY, CROSSINGS_KEY)}
        with self.guard.guarded():
            self._take(batch, ours)
        if self._drop_dataset_id:
            # Megatron cuts every entry along its second axis, but this entry has only one.
            rest.pop("dataset_id", None)
        return rest

    def of_tokens(self, shape: torch.Size) -> Tensor:
        """Give each token its id.

        Args:
            shape: the shape of the labels: [B, S], or flattened [1, B * S].

        Returns:
            int64 of this shape.

        Raises:
            BoundaryError: the ids do not fit labels of this shape.
        """
        ids, rows = self.ids, self.rows or shape
        assert ids is not None
        if ids.numel() == shape.numel():
            return ids.reshape(shape)
        if rows.numel() == shape.numel():
            if self.cu_seqlens is not None:
                return token_channel_ids(ids, self.cu_seqlens, rows.numel()).reshape(shape)
            if ids.numel() == rows[0]:
                return ids.unsqueeze(1).expand(rows).reshape(shape)
        raise BoundaryError(
            f"channel ids of shape {list(ids.shape)} do not fit labels of shape {list(shape)}: "
            "there must be one per row or one per token; take both from the same batch, and cut "
            "them by the same function."
        )

    def _take(self, batch: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        key, self.ids = _ids_of(batch, self.table)
        sequences, crossings = ours[SEQUENCES_KEY], ours[CROSSINGS_KEY]
        self.rows, self.labels = _rows_of(batch), batch.get("labels")
        if self.ids is not None and self.rows is not None and key == "channels":
            self.cu_seqlens = _bounds_for(self.ids, batch, self.rows)
        if sequences is not None:
            self.sequences = sequences[sequences != NO_SEQUENCE]
        elif self.ids is not None and self.ids.dim() == 1:
            self.sequences = self.ids
        if self._with_places and self.rows is not None:
            self.places = _places_of(batch, self.rows)
        if crossings is not None:
            self.num_crossings += int(crossings.sum())


def current_ids() -> BatchIds | None:
    """Those of the forward step that runs now; None outside of one."""
    return _current.get()


class Tap:
    """A data iterator that takes the ids out of each batch.

    Args:
        data_iterator: the iterator that gives the batches.
        micro_batch: reads the ids of each batch.
    """

    def __init__(self, data_iterator: Any, micro_batch: BatchIds) -> None:
        self._data_iterator = data_iterator
        self._micro_batch = micro_batch

    def __iter__(self) -> Tap:
        return self

    def __next__(self) -> Any:
        return self._micro_batch.read(next(self._data_iterator))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data_iterator, name)


def _ids_of(batch: Mapping[str, Any], table: LabelTable) -> tuple[str, Tensor | None]:
    """The key that holds the ids of a batch, and the ids."""
    for key in (BATCH_KEY, "channels", "dataset_id"):
        value = batch.get(key)
        if isinstance(value, Tensor):
            return key, _checked(value.long(), key, table)
        if isinstance(value, (list, tuple)):
            return key, torch.tensor(table.ids(value), dtype=torch.int64, device="cpu")
    return "", None


def _rows_of(batch: Mapping[str, Any]) -> torch.Size | None:
    """The shape [B, S] of the batch from the data iterator; [1, S] if it is flat."""
    for key in ("labels", "tokens", "loss_mask"):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() in (1, 2):
            return value.shape if value.dim() == 2 else torch.Size((1, *value.shape))
    return None


def _bounds_for(ids: Tensor, batch: Mapping[str, Any], rows: torch.Size) -> Tensor | None:
    """The boundaries, if there is one id per sequence; None if there is one per row or token.

    Raises `BoundaryError` if the number of ids fits neither of these.
    """
    bounds = _bounds_of(batch, rows)
    if bounds is not None and ids.dim() == 1 and ids.numel() == bounds.numel() - 1:
        return bounds
    if ids.numel() == rows.numel() or (ids.dim() == 1 and ids.numel() == rows[0]):
        return None
    held = "no cu_seqlens" if bounds is None else f"{bounds.numel() - 1} sequences (cu_seqlens)"
    raise BoundaryError(
        f"channels of shape {list(ids.shape)} do not fit a batch of {rows[0]} rows of {rows[1]} "
        f"tokens with {held}; give one channel per sequence, per row or per token."
    )


def _bounds_of(batch: Mapping[str, Any], rows: torch.Size) -> Tensor | None:
    """The boundaries in a batch, as int32 [N + 1] over all rows; None if it has none.

    Those of a row may be filled up with the length of the row.
    """
    found = [batch.get(key) for key in _BOUNDS_KEYS]
    params = batch.get("packed_seq_params")
    found += [getattr(params, key, None) for key in _BOUNDS_KEYS]
    given = next((value for value in found if isinstance(value, Tensor)), None)
    if given is None:
        return None
    of_rows = given.reshape(-1, given.shape[-1]).int()
    if len(of_rows) not in (1, rows[0]):
        return None
    starts = [
        row[:-1][row.diff() > 0] + number * rows[1] for number, row in enumerate(of_rows.unbind())
    ]
    end = of_rows.new_tensor([rows[1] * (len(of_rows) - 1)]) + of_rows[-1].max()
    return torch.cat([*starts, end])


def _places_of(batch: Mapping[str, Any], rows: torch.Size) -> Places:
    """From the boundaries of a batch, else from its positions; else each row is one sequence."""
    bounds, positions = _bounds_of(batch, rows), batch.get("position_ids")
    if bounds is None and isinstance(positions, Tensor) and positions.numel() == rows.numel():
        return places_of_positions(positions.view(rows)).of_next()
    like = next(one for one in batch.values() if isinstance(one, Tensor))
    return places(rows, bounds, None, like).of_next()


def _checked(ids: Tensor, key: str, table: LabelTable) -> Tensor:
    """Check the range of ids that are on the host. Others would make us wait for the device."""
    if ids.device.type != "cpu" or not ids.numel():
        return ids
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= len(table):
        raise ChannelError(
            f"{key} of the batch must be -1 (unlabeled) or 0 to {len(table) - 1} for the "
            f"channels {list(table.names)}, but ranges from {low} to {high}; give --channels "
            "one name per data set of the blend, in its order."
        )
    return ids
