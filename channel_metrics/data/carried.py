"""What travels with the sequences of a batch: record ids, and numbers of a reference model.

In the collator they are a part of the name of the channel. So whatever sorts, packs or drops
channels does the same to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.extremes import id_words
from channel_metrics.core.names import look_up
from channel_metrics.data.reference import REFERENCE_KEY, Reference, reference_of, split_names

__all__ = ["RECORD_IDS_KEY", "Carried", "carried_of", "split_carried", "without_carried"]

# The batch key: int64 [N, ID_WORDS], see `id_words`.
RECORD_IDS_KEY = "channel_record_ids"
_MARK = "\x03"
# What travels begins with a mark, here or in `data.reference`.
_TRAVELS = re.compile("[\x02\x03].*", re.DOTALL)

Names = list[list[str | None]]


class Carried:
    """Joins channels with what travels with them.

    Args:
        reference: finds the numbers of a reference model; None if they are not needed.
        id_field: the dotted field of a record with its id; empty if it is not needed.
    """

    def __init__(self, reference: Reference | None, id_field: str = "") -> None:
        self.reference, self.id_field = reference, id_field

    @property
    def own_fields(self) -> tuple[str, ...]:
        """The fields of a record that nobody else needs."""
        return self.reference.own_fields if self.reference else ()

    @property
    def roots(self) -> tuple[str, ...]:
        """The fields of a record that are read; of a dotted one, its first part."""
        of_id = (self.id_field.split(".", 1)[0],) if self.id_field else ()
        return (*(self.reference.roots if self.reference else ()), *of_id)

    def joined(self, records: Sequence[Mapping[str, Any]], channels: Names) -> Names:
        """The channels of each record, joined; raises `ChannelError` as `Reference.joined`."""
        if self.reference is not None:
            channels = self.reference.joined(records, channels)
        if not self.id_field:
            return channels
        return [
            [_with_id(name, given) for name, given in zip(names, ids, strict=True)]
            for names, ids in (
                (names, _ids(look_up(record, self.id_field), len(names)))
                for record, names in zip(records, channels, strict=True)
            )
        ]


def carried_of(config: MetricsConfig) -> Carried | None:
    """What travels with the sequences for this config; None if nothing does.

    Raises:
        ConfigError: the table of a reference model cannot be read.
    """
    reference, id_field = reference_of(config), config.outliers_id
    return Carried(reference, id_field) if reference or id_field else None


def split_carried(names: Sequence[str | None]) -> tuple[list[str | None], dict[str, Tensor]]:
    """The names alone, and the keys of the batch for what travelled with them."""
    parts = [("" if name is None else name).partition(_MARK) for name in names]
    names, reference = split_names([name or None for name, _, _ in parts])
    found = {} if reference is None else {REFERENCE_KEY: reference}
    if any(mark for _, mark, _ in parts):
        words = [id_words(own or None) for _, _, own in parts]
        found[RECORD_IDS_KEY] = torch.tensor(words, dtype=torch.int64, device="cpu")
    return names, found


def without_carried(name: str | None) -> str | None:
    """The name alone; None if something travelled without a name."""
    return name and (_TRAVELS.sub("", name) or None)


def _with_id(name: str | None, given: Any) -> str | None:
    return name if given is None else f"{name or ''}{_MARK}{given}"


def _ids(given: Any, num_sequences: int) -> list[Any]:
    """The id of each sequence: a list of ids, or that of the record."""
    if getattr(given, "ndim", 0) == 1:
        given = given.tolist()
    if isinstance(given, (list, tuple)):
        return list(given) if len(given) == num_sequences else [None] * num_sequences
    return [given] * num_sequences
