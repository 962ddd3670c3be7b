"""The channel of each token in Megatron, from the data iterator to the layout of the loss mask.

Ids are read from the batch as the data iterator gives it, on the ranks that have one. Whatever
cuts the labels for context parallelism is called a second time with the ids in place of the
labels: no slicing of Megatron's is repeated here, so none can differ.

Letters: B rows of the micro-batch, S sequence length.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import ChannelTable
from channel_metrics.errors import BoundaryError, ChannelError

__all__ = [
    "BATCH_KEY",
    "CROSSINGS_KEY",
    "NO_SEQUENCE",
    "SEQUENCES_KEY",
    "MicroBatch",
    "Tap",
    "follow_labels",
    "in_layout",
]

# Under this key our data sets put the ids: one per row, or one per token.
BATCH_KEY = "channel_ids"
# Under this key a pack gives the channel of each of its sequences, filled up with NO_SEQUENCE.
SEQUENCES_KEY = "channel_sequences"
NO_SEQUENCE = -2
# Under this key a pack says how many of its supervised targets belong to the next sequence.
CROSSINGS_KEY = "channel_crossings"

# Entries of a batch that say how to cut it; with those that start with cu_seqlens.
_HOW_TO_CUT = ("max_seqlen", "local_cp_size", "hybrid_cp_group")

_current: contextvars.ContextVar[MicroBatch | None] = contextvars.ContextVar(
    "channel_metrics_micro_batch", default=None
)


class MicroBatch:
    """The ids of the micro-batch whose forward step runs now.

    ids: int64 [B] (one channel per row) or of the shape of the labels; None on ranks without
        data.
    is_cut: whether the ids have gone through the cut of context parallelism.
    sequences: int64, the channel of each sequence, whatever is cut.
    """

    def __init__(
        self, table: ChannelTable, guard: FaultGuard, *, drop_dataset_id: bool = False
    ) -> None:
        self.table = table
        self.guard = guard
        self.ids: Tensor | None = None
        self.sequences: Tensor | None = None
        self.is_cut = False
        self.num_batches = 0
        self.num_crossings = 0
        self._drop_dataset_id = drop_dataset_id

    @contextmanager
    def active(self) -> Iterator[MicroBatch]:
        """While this holds, cuts of labels are followed."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)

    def read(self, batch: Any) -> Any:
        """Take the ids out of a batch: the batch without them, as the script knows it."""
        self.num_batches += 1
        if not isinstance(batch, Mapping):
            return batch
        rest = dict(batch)
        ours = {key: rest.pop(key, None) for key in (BATCH_KEY, SEQUENCES_KEY, CROSSINGS_KEY)}
        with self.guard.guarded():
            self._take(batch, ours)
        if self._drop_dataset_id:
            # Megatron cuts every entry along its second axis, which this one does not have.
            rest.pop("dataset_id", None)
        return rest

    def _take(self, batch: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        self.ids = _ids_of(batch, self.table)
        sequences, crossings = ours[SEQUENCES_KEY], ours[CROSSINGS_KEY]
        if sequences is not None:
            self.sequences = sequences[sequences != NO_SEQUENCE]
        elif self.ids is not None and self.ids.dim() == 1:
            self.sequences = self.ids
        if crossings is not None:
            self.num_crossings += int(crossings.sum())


class Tap:
    """A data iterator that shows a micro-batch what it gives."""

    def __init__(self, data_iterator: Any, micro_batch: MicroBatch) -> None:
        self._data_iterator = data_iterator
        self._micro_batch = micro_batch

    def __iter__(self) -> Tap:
        return self

    def __next__(self) -> Any:
        return self._micro_batch.read(next(self._data_iterator))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data_iterator, name)


def follow_labels(cut: Callable[..., Any], batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """What `cut(batch, ...)` returns: it cuts a batch for context parallelism.

    The ids of the micro-batch whose forward step runs now are cut as its labels are. `cut`
    returns the batch, or a tuple that starts with it.
    """
    now = _current.get()
    labels = batch.get("labels")
    if now is None or now.ids is None or labels is None:
        return cut(batch, *args, **kwargs)
    probe: dict[str, Any] = {}
    with now.guard.guarded():
        ids = in_layout(now.ids, labels.shape).to(labels.device, non_blocking=True)
        # Before the cut, which changes the batch in place.
        probe = {key: _probe_entry(key, value, ids) for key, value in batch.items()}
    result = cut(batch, *args, **kwargs)
    with now.guard.guarded():
        if probe:
            cut_probe = cut(probe, *args, **kwargs)
            now.ids = (cut_probe[0] if isinstance(cut_probe, tuple) else cut_probe)["labels"]
            now.is_cut = True
    return result


def in_layout(ids: Tensor, shape: torch.Size) -> Tensor:
    """int64 of `shape` [B, S] or [1, B * S], from ids per row [B] or per token.

    Raises `BoundaryError` if they cannot be about the same tokens.
    """
    if ids.numel() == shape.numel():
        return ids.reshape(shape)
    if ids.dim() == 1 and ids.numel() and shape.numel() % ids.numel() == 0:
        return ids.unsqueeze(1).expand(-1, shape.numel() // ids.numel()).reshape(shape)
    raise BoundaryError(
        f"channel ids of shape {list(ids.shape)} do not fit labels of shape {list(shape)}: "
        "there must be one per row or one per token; take both from the same batch, and cut "
        "them by the same function."
    )


def _probe_entry(key: str, value: Any, ids: Tensor) -> Any:
    # Functions differ in which of the two they take the length from.
    if key in ("labels", "tokens"):
        return None if value is None else ids
    return value if key.startswith("cu_seqlens") or key in _HOW_TO_CUT else None


def _ids_of(batch: Mapping[str, Any], table: ChannelTable) -> Tensor | None:
    for key in (BATCH_KEY, "channels", "dataset_id"):
        value = batch.get(key)
        if isinstance(value, Tensor):
            return _checked(value.long(), key, table)
        if isinstance(value, (list, tuple)):
            return torch.tensor(table.ids(value), dtype=torch.int64)
    return None


def _checked(ids: Tensor, key: str, table: ChannelTable) -> Tensor:
    """Ids on the host can be checked without waiting for a device."""
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
