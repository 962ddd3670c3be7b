"""`ChannelCollator` wraps any collator and adds `channels` and `cu_seqlens` to its batch.

>>> from channel_metrics.data.collator import ChannelCollator
>>> collate = ChannelCollator(lambda fs: {"input_ids": torch.tensor([f["ids"] for f in fs])})
>>> batch = collate([{"ids": [1, 2], "channel": "bbu"}, {"ids": [3, 4], "channel": "rru"}])
>>> batch["channels"], batch["cu_seqlens"].tolist()
(['bbu', 'rru'], [0, 2, 4])
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.boundaries import Boundaries, boundaries_from_batch
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.faults import Once
from channel_metrics.core.labels import DEFAULT_FIELDS, LabelTable, channels_of, field_roots
from channel_metrics.core.token_axes import TokenColumn
from channel_metrics.data.batch_layout import (
    WHOLE_KEY,
    Names,
    as_record,
    has_channel_per_token,
    names_per_run,
    names_per_sequence,
    own_channels,
    rows_of,
    spans_of_records,
    without_pads,
)
from channel_metrics.data.carried import Carried, split_carried
from channel_metrics.data.collator_fault import CollatorFault
from channel_metrics.data.dispatched import names_cannot_be_sent, sends_only_tensors
from channel_metrics.data.record_order import (
    Span,
    matched_records,
    tokens_of_records,
    tokens_of_spans,
)
from channel_metrics.data.token_marks import MARKS_KEY, absent_columns, token_marks
from channel_metrics.errors import ChannelError

__all__ = ["BOUNDS_KEY", "RECORDS_KEY", "ChannelCollator"]

logger = logging.getLogger("channel_metrics")

# Not "cu_seqlens": a model may take an argument of that name.
BOUNDS_KEY = "channel_cu_seqlens"
# For each row or sequence the number of its record, if the collator changed their order.
RECORDS_KEY = "channel_records"
# The order is checked in so many batches at first, and then in one of so many.
_FIRST_BATCHES, _ONE_OF = 8, 100

Record = Mapping[str, Any]


class ChannelCollator:
    """Wraps `base` and adds keys to its batch. The other keys stay as they are.

    Args:
        base: the collator; it must return a dict.
        fields: dotted record fields that may hold the channel.
        table: with it, `channels` is an int64 tensor [N] of its ids, else a list of names. It is
            also a list if the table would grow: growth in a worker process would be lost.
        strip: record keys that `base` must not see; by default `roots`.
        bounds_key: the batch key for the boundaries, int32 [N + 1].
        row_bounds: whether to add the boundaries even if every row is one sequence.
        carry_faults: whether an error of ours travels in the batch, as `channels`, so that the
            main process decides about it. Otherwise it is raised.
        classes: {field: names} for fields with class numbers, see `data.scan.class_names`.
        records_key: the batch key for the numbers of the records; added if their order changes.
        columns: the columns with a label per token, see `TokenAxes.columns`.
        carried: joins channels with what travels with them, such as record ids.

    If `base` returns `channels` itself (names or ids, one per sequence), they are not compared
    with the records; if rows are not sequences, it may add boundaries under `bounds_key`.
    Otherwise, some batches are compared with the `input_ids` of their records, and the channels
    follow if `base` sorts them. If records have no `input_ids`, `base` must keep their order.

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
        classes: Mapping[str, Sequence[str]] | None = None,
        records_key: str | None = None,
        columns: Sequence[TokenColumn] = (),
        carried: Carried | None = None,
    ) -> None:
        self.base = base
        self.columns = tuple(columns)
        self.classes = dict(classes or {})
        self.records_key = records_key
        self.carry_faults = carry_faults
        self.fields = tuple(fields)
        self.table = table
        self.carried = carried
        own = (*(carried.own_fields if carried else ()), *field_roots(self._of_tokens))
        self.strip = frozenset((*field_roots(fields), *own) if strip is None else strip)
        self.bounds_key = bounds_key
        self.row_bounds = row_bounds
        self._warned: set[str] = set()
        self._num_batches = 0
        self._reorders = False
        # Whether a sequence of some batch held exactly the tokens of a record.
        self._comparable = False

    @property
    def roots(self) -> tuple[str, ...]:
        """The record keys that this collator reads."""
        of_carried = self.carried.roots if self.carried else ()
        return (*field_roots([*self.fields, *self._of_tokens]), *of_carried)

    @property
    def _of_tokens(self) -> list[str]:
        return [field for field, _ in self.columns]

    def around(self, base: Callable[[list[Any]], Any]) -> ChannelCollator:
        """A copy of this collator that wraps another `base`."""
        other = copy.copy(self)
        other.base, other._warned = base, set()
        return other

    def __getattr__(self, name: str) -> Any:
        # Trainers read attributes of their collator, such as `tokenizer`.
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
        except Exception as error:  # whatever it is, the main process decides if it can
            if error is collate.error or sends_only_tensors(self):
                raise
            batch = collate.result if collate.called else self._base_batch(features)
            if not isinstance(batch, MutableMapping):
                raise
            batch["channels"] = CollatorFault.of(error)
            return batch

    def _base_batch(self, features: Sequence[Any]) -> Any:
        return self.base([self._without_fields(feature) for feature in features])

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        # Copies, because collators may change their records.
        records = [dict(f) if isinstance(f, Mapping) else f for f in features]
        batch = collate(features)
        if not isinstance(batch, MutableMapping):
            raise ChannelError(
                f"the wrapped collator must return a dict, but returned {type(batch).__name__}; "
                "channels need a batch that they can ride in."
            )
        if "channels" in batch:
            channels = own_channels(batch["channels"], self.table)
            bounds = batch.pop(self.bounds_key, None)
            view = batch if bounds is None else {**batch, "cu_seqlens": bounds}
            batch.update(self._added_keys(view, channels))
        else:
            found = [as_record(record) for record in records]
            channels = [channels_of(record, self.fields, self.classes) for record in found]
            if self.carried is not None:
                channels = self.carried.joined(found, channels)
            batch.update(self._added_keys(batch, channels, found))
        return batch

    def _added_keys(
        self, batch: Mapping[str, Any], channels: Names, records: Sequence[Record] = ()
    ) -> dict[str, Any]:
        """`channels` and the boundaries.

        channels: those that each record lists. records: those to compare the order of the batch
        with; none if it must not be compared.
        """
        given, records = records, records or [{}] * len(channels)
        per_token = [has_channel_per_token(r, c) for r, c in zip(records, channels, strict=True)]
        counts = [1 if all_ else len(c) for all_, c in zip(per_token, channels, strict=True)]
        boundaries = without_pads(boundaries_from_batch(batch), sum(counts), batch)
        spans = spans_of_records(counts, boundaries, batch)
        order = self._changed_order(records, batch, boundaries, spans)
        if order is not None:
            channels, given = [channels[i] for i in order], [records[i] for i in order]
        added: dict[str, Any] = {}
        if self.columns:
            added[MARKS_KEY] = token_marks(self.columns, given, spans, boundaries, batch)
            if self._num_batches == 1:
                self._warn_once(*absent_columns(self.columns, given))
        if any(per_token) and spans is not None:
            if self.bounds_key == BOUNDS_KEY:
                added[WHOLE_KEY] = boundaries.cu_seqlens
            names, boundaries = names_per_run(channels, spans, boundaries)
        else:
            names = names_per_sequence(channels, boundaries, batch)
            self._check_labels(batch.get("labels"), boundaries)
        names, more = split_carried(names) if self.carried else (names, {})
        added |= {"channels": self._ids_or_names(names), **more}
        if self.row_bounds or boundaries.num_sequences != rows_of(batch)[0]:
            added[self.bounds_key] = boundaries.cu_seqlens
        if order is not None and self.records_key is not None:
            added[self.records_key] = torch.tensor(order, device="cpu")
        return added

    def _changed_order(
        self,
        records: Sequence[Record],
        batch: Mapping[str, Any],
        boundaries: Boundaries,
        spans: Sequence[Span] | None,
    ) -> list[int] | None:
        """The number of the record in each span; None if in order, or if it cannot be compared."""
        count, self._num_batches = self._num_batches, self._num_batches + 1
        due = self._reorders or count < _FIRST_BATCHES or count % _ONE_OF == 0
        tokens = tokens_of_records(records) if due and spans is not None else None
        sequences = None if tokens is None else tokens_of_spans(batch, boundaries, spans or ())
        if tokens is None or sequences is None:
            return None
        found, exact = matched_records(sequences, tokens)
        order = [number for number in found if number is not None]
        self._comparable |= exact
        if not self._comparable:
            # If the collator changes the tokens of every record, their order cannot be seen.
            return None
        if len(order) < len(found):
            raise ChannelError(
                f"sequence {found.index(None)} of a batch holds the tokens of none of its "
                f"{len(found)} records: the collator reorders, drops or replaces records, so their "
                "channels cannot be matched. Do this in the dataset, before the collator, or let "
                "the collator return `channels` itself, one name per sequence."
            )
        if order == list(range(len(order))):
            return None
        late = 0 if self._reorders or count < _FIRST_BATCHES else _ONE_OF - 1
        self._reorders = True
        self._warn_once(
            late,
            "the collator changes the order of records, which it did not do at first: up to %d "
            "batches before this one may have been counted under other channels.",
        )
        return order

    def _ids_or_names(self, names: list[str | None]) -> Tensor | list[str | None]:
        if self.table is None or not self.table.knows_all(names):
            if sends_only_tensors(self):
                raise names_cannot_be_sent()
            return names
        return torch.tensor(self.table.ids(names), dtype=torch.int64, device="cpu")

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
