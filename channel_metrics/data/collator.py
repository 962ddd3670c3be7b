"""`ChannelCollator`: any collator, plus the `channels` and `cu_seqlens` of the batch.

>>> from channel_metrics.data.collator import ChannelCollator
>>> collate = ChannelCollator(lambda fs: {"input_ids": torch.tensor([f["ids"] for f in fs])})
>>> batch = collate([{"ids": [1, 2], "channel": "bbu"}, {"ids": [3, 4], "channel": "rru"}])
>>> batch["channels"], batch["cu_seqlens"].tolist()
(['bbu', 'rru'], [0, 2, 4])
"""

from __future__ import annotations

import copy
import logging
import pickle
import traceback
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.boundaries import Boundaries, boundaries_from_batch
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.faults import Once
from channel_metrics.core.labels import DEFAULT_FIELDS, LabelTable, channels_of, field_roots
from channel_metrics.errors import ChannelError, ChannelMetricsError

__all__ = ["BOUNDS_KEY", "ChannelCollator", "CollatorFault"]

logger = logging.getLogger("channel_metrics")

# Not "cu_seqlens": a model may take an argument of that name, which must reach it untouched.
BOUNDS_KEY = "channel_cu_seqlens"


@dataclass(frozen=True)
class CollatorFault:
    """An error of ours in a collator, on its way to the main process in place of `channels`."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> CollatorFault:
        """The error, or what can be sent of it."""
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            trace = "".join(traceback.format_exception(error))
            error = ChannelMetricsError(f"the channels of a batch could not be collated.\n{trace}")
        return cls(error)


class ChannelCollator:
    """Wraps `base`; its batch is unchanged but for the added keys.

    fields: dotted record fields that may hold the channel.
    table: with it, `channels` is an int64 tensor [num_sequences] of its ids; without it, and
        for names that it does not know and may not refuse, a list of names. Collators run in
        worker processes: a table that grew there would be lost.
    strip: record keys that `base` must not see; None takes the roots of `fields`, which most
        collators drop or choke on.
    bounds_key: the batch key for the boundaries, int32 [num_sequences + 1].
    row_bounds: whether the boundaries are added even if every row is one sequence.
    carry_faults: whether an error of ours travels in the batch, as `channels`, because it
        is for the main process to decide what becomes of it. Without this it is raised.

    Raises `ChannelError` if records and sequences do not fit each other.
    """

    def __init__(
        self,
        base: Callable[[list[Any]], Any],
        *,
        fields: Sequence[str] = DEFAULT_FIELDS,
        table: LabelTable | None = None,
        strip: Sequence[str] | None = None,
        bounds_key: str = "cu_seqlens",
        row_bounds: bool = True,
        carry_faults: bool = False,
    ) -> None:
        self.base = base
        self.carry_faults = carry_faults
        self.fields = tuple(fields)
        self.table = table
        self.strip = frozenset(field_roots(fields) if strip is None else strip)
        self.bounds_key = bounds_key
        self.row_bounds = row_bounds
        self._warned: set[str] = set()

    @property
    def roots(self) -> tuple[str, ...]:
        """The record keys that this collator reads the channel from."""
        return field_roots(self.fields)

    def around(self, base: Callable[[list[Any]], Any]) -> ChannelCollator:
        """The same collator around another `base`."""
        other = copy.copy(self)
        other.base, other._warned = base, set()
        return other

    def __getattr__(self, name: str) -> Any:
        # Trainers look at attributes of their collator (`tokenizer`, `padding_free`, ...).
        if name.startswith("__") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def __call__(self, features: Sequence[Any]) -> Any:
        """Collate `features` with `base`, and add the channels of their sequences."""
        if not self.carry_faults:
            return self._with_channels(self._base_batch, features)
        collate = Once(self._base_batch)
        try:
            return self._with_channels(collate, features)
        except Exception as error:
            if error is collate.error:
                raise
            batch = collate.result if collate.called else self._base_batch(features)
            if not isinstance(batch, MutableMapping):
                raise
            batch["channels"] = CollatorFault.of(error)
            return batch

    def _base_batch(self, features: Sequence[Any]) -> Any:
        return self.base([self._without_fields(feature) for feature in features])

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        records = [_as_record(feature) for feature in features]
        channels = [channels_of(record, self.fields) for record in records]
        batch = collate(features)
        if not isinstance(batch, MutableMapping):
            raise ChannelError(
                f"the wrapped collator must return a dict, but returned {type(batch).__name__}; "
                "channels need a batch that they can ride in."
            )
        if "channels" in batch:
            raise ChannelError(
                "the wrapped collator already returned the key 'channels'; rename that column, "
                "or leave the annotation to one of the two."
            )
        batch.update(self._added_keys(batch, channels))
        return batch

    def _added_keys(
        self, batch: Mapping[str, Any], channels: list[list[str | None]]
    ) -> dict[str, Any]:
        """`channels` and the boundaries; channels: those that each record lists."""
        num_names = sum(len(of_record) for of_record in channels)
        boundaries = _without_pad_tail(boundaries_from_batch(batch), num_names, batch)
        self._check_labels(batch.get("labels"), boundaries)
        names = _names_per_sequence(channels, boundaries, batch)
        added: dict[str, Any] = {"channels": self._ids_or_names(names)}
        if self.row_bounds or boundaries.num_sequences != _rows(batch)[0]:
            added[self.bounds_key] = boundaries.cu_seqlens
        return added

    def _ids_or_names(self, names: list[str | None]) -> Tensor | list[str | None]:
        if self.table is None or not self.table.knows_all(names):
            return names
        return torch.tensor(self.table.ids(names), dtype=torch.int64)

    def _without_fields(self, feature: Any) -> Any:
        if not isinstance(feature, Mapping) or not self.strip.intersection(feature):
            return feature
        return {key: value for key, value in feature.items() if key not in self.strip}

    def _check_labels(self, labels: Any, boundaries: Boundaries) -> None:
        if not isinstance(labels, Tensor) or labels.dim() not in (1, 2):
            return
        supervised = labels.flatten() != IGNORE_INDEX
        if boundaries.keep is not None:
            self._warn_once(
                int((supervised & ~boundaries.keep).sum()),
                "%d labels stand on padding and are not -100: the loss trains on them, so they "
                "are counted; set the labels of pad positions to -100.",
            )
        bounds = boundaries.cu_seqlens.long()
        starts = bounds[1:-1][bounds.diff()[1:] > 0]
        row_starts = starts % max(labels.shape[-1], 1) == 0
        inner = starts[~row_starts & (starts < supervised.numel())]
        self._warn_once(
            int(supervised[inner].sum()),
            "%d sequences start with a label that is not -100: a causal loss predicts it from "
            "the sequence before; it is counted for its own channel. Set the first label of "
            "each packed sequence to -100.",
        )

    def _warn_once(self, count: int, message: str) -> None:
        if count and message not in self._warned:
            self._warned.add(message)
            logger.warning("first such batch: " + message, count)


def _without_pad_tail(
    boundaries: Boundaries, num_names: int, batch: Mapping[str, Any]
) -> Boundaries:
    """Padding-free rows that are padded to a multiple end in pads that look like sequences.

    TRL gives all of them position 0, and labels of -100: nothing there is counted.
    """
    labels = batch.get("labels")
    if boundaries.num_sequences <= num_names or not isinstance(labels, Tensor):
        return boundaries
    tail = boundaries.cu_seqlens[num_names:]
    pads = labels.flatten()[int(tail[0]) : int(tail[-1])]
    if _rows(batch)[0] != 1 or bool((tail.diff() != 1).any() | (pads != IGNORE_INDEX).any()):
        return boundaries
    return Boundaries(boundaries.cu_seqlens[: num_names + 1], boundaries.keep)


def _names_per_sequence(
    channels: list[list[str | None]], boundaries: Boundaries, batch: Mapping[str, Any]
) -> list[str | None]:
    names = [name for of_record in channels for name in of_record]
    held = boundaries.num_sequences
    counts = _sequences_per_row(boundaries, batch)
    by_row = len(channels) == len(counts)
    if by_row:
        # Each record is one row: its one channel is that of all its sequences, or it lists them.
        rows = [c * n if len(c) == 1 else c for c, n in zip(channels, counts, strict=True)]
        if [len(row) for row in rows] == counts:
            return [name for row in rows for name in row]
    # Which row a sequence of no tokens is in cannot be seen where two rows meet.
    certain = by_row and bool((boundaries.cu_seqlens.diff() > 0).all())
    if len(names) == held and not certain:
        return names
    if all(name is None for name in names):
        return [None] * held
    per_row = f"{[len(c) for c in channels]} against {counts} per row, " if by_row else ""
    raise ChannelError(
        f"the records name {len(names)} channels but the batch holds {held} sequences "
        f"({per_row}boundaries {boundaries.cu_seqlens[:8].tolist()}{'...' if held > 7 else ''}); "
        "a packer must keep one channel per sequence, in order."
    )


def _as_record(feature: Any) -> Mapping[str, Any]:
    if isinstance(feature, Mapping):
        return feature
    if not hasattr(feature, "__dict__"):
        raise ChannelError(
            "a record must be a mapping or an object with attributes to have a channel, but is "
            f"{type(feature).__name__}; return a dict from the dataset."
        )
    record: Mapping[str, Any] = vars(feature)
    return record


def _sequences_per_row(boundaries: Boundaries, batch: Mapping[str, Any]) -> list[int]:
    num_rows, row_length = _rows(batch)
    if not num_rows or not row_length:
        return []
    rows = (boundaries.cu_seqlens[:-1].long() // row_length).clamp(max=num_rows - 1)
    counts: list[int] = torch.bincount(rows, minlength=num_rows).tolist()
    return counts


def _rows(batch: Mapping[str, Any]) -> tuple[int, int]:
    """The number of rows and their length; (0, 0) where no token tensor shows them."""
    for key in ("labels", "input_ids"):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() > 0:
            return (value.shape[0], value.shape[1]) if value.dim() > 1 else (1, value.shape[0])
    return 0, 0
