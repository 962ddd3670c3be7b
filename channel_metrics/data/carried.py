"""What travels with the sequences of a batch: record ids, and numbers of a reference model.

In the collator they are a part of the name of the channel. So whatever sorts, packs or drops
channels does the same to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from channel_metrics.config import MetricsConfig
from channel_metrics.core.extremes import id_words
from channel_metrics.core.names import look_up
from channel_metrics.data.reference import (
    NO_PAIR,
    REFERENCE_KEY,
    Pair,
    Reference,
    reference_of,
)
from channel_metrics.errors import ChannelError

__all__ = [
    "INDEX",
    "RECORD_IDS_KEY",
    "Carried",
    "Indexed",
    "carried_of",
    "split_carried",
    "split_roles",
    "with_roles",
    "without_carried",
]

# The batch key: int64 [N, ID_WORDS], see `id_words`.
RECORD_IDS_KEY = "channel_record_ids"
# As `id_field` of outliers: the place of a record in its dataset.
INDEX = "@index"
# In a name, what travels is behind two of these: "bbu", mark, "1.5 3" (nll, tokens), mark, id.
_MARK = "\x03"
# Behind this one are the roles of the tokens in runs, such as "0*3 2*9".
_OF_ROLES = "\x04"

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
        of_id = (INDEX,) if self.id_field == INDEX else ()
        return (*(self.reference.own_fields if self.reference else ()), *of_id)

    @property
    def roots(self) -> tuple[str, ...]:
        """The fields of a record that are read; of a dotted one, its first part."""
        of_id = (self.id_field.split(".", 1)[0],) if self.id_field else ()
        return (*(self.reference.roots if self.reference else ()), *of_id)

    def joined(self, records: Sequence[Mapping[str, Any]], channels: Names) -> Names:
        """The channels of each record, joined; raises `ChannelError` as `Reference.pairs`."""
        return [
            self._joined(record, names) for record, names in zip(records, channels, strict=True)
        ]

    def _joined(self, record: Mapping[str, Any], names: list[str | None]) -> list[str | None]:
        count = len(names)
        if self.id_field == INDEX and INDEX not in record:
            raise ChannelError(
                f"id_field of outliers is {INDEX!r}, but a record has only "
                f"{', '.join(record)}: the Trainer of transformers knows the index in a "
                "`datasets.Dataset`. Elsewhere, add a column with it, and name it as id_field."
            )
        pairs = self.reference.pairs(record, count) if self.reference else [NO_PAIR] * count
        ids = _ids(look_up(record, self.id_field) if self.id_field else None, count)
        return [_with(*of_sequence) for of_sequence in zip(names, pairs, ids, strict=True)]


class Indexed(Dataset[Any]):
    """The records of a `datasets.Dataset`, each with its `INDEX`. Nothing is copied."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], INDEX: index}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        records = self.dataset.__getitems__(indices)
        return [{**r, INDEX: index} for index, r in zip(indices, records, strict=True)]


def carried_of(config: MetricsConfig) -> Carried | None:
    """What travels with the sequences for this config; None if nothing does.

    Raises:
        ConfigError: the table of a reference model cannot be read.
    """
    reference, id_field = reference_of(config), config.outliers_id
    return Carried(reference, id_field) if reference or id_field else None


def split_carried(names: Sequence[str | None]) -> tuple[list[str | None], dict[str, Tensor]]:
    """The names alone, and the keys of the batch for what travelled with them."""
    parts = [("" if name is None else name).split(_MARK, 2) for name in names]
    travelled = [tuple(more) if more else ("", "") for _, *more in parts]
    found: dict[str, Tensor] = {}
    if any(numbers for numbers, _ in travelled):
        pairs = [tuple(map(float, numbers.split())) or NO_PAIR for numbers, _ in travelled]
        held = torch.tensor(pairs, dtype=torch.float64, device="cpu")
        found[REFERENCE_KEY] = held.view(torch.int64)
    if any(own for _, own in travelled):
        words = [id_words(own or None) for _, own in travelled]
        found[RECORD_IDS_KEY] = torch.tensor(words, dtype=torch.int64, device="cpu")
    return [name or None for name, *_ in parts], found


def without_carried(name: str | None) -> str | None:
    """The name alone; None if something travelled without a name."""
    return name and (split_roles(name.partition(_MARK)[0])[0] or None)


def with_roles(name: str | None, roles: Sequence[int]) -> str:
    """A name that the roles of the tokens of its sequence travel with."""
    runs = " ".join(f"{role}*{len([*run])}" for role, run in groupby(roles))
    return f"{name or ''}{_OF_ROLES}{runs}"


def split_roles(name: str | None) -> tuple[str | None, list[int] | None]:
    """The name without roles, and the roles; None if there are none."""
    if name is None or _OF_ROLES not in name:
        return name, None
    name, runs = name.split(_OF_ROLES, 1)
    pairs = (run.split("*") for run in runs.split())
    return name or None, [int(role) for role, count in pairs for _ in range(int(count))]


def _with(name: str | None, pair: Pair, given: Any) -> str | None:
    numbers = "" if pair is NO_PAIR else f"{pair[0]!r} {pair[1]!r}"
    own = "" if given is None else str(given)
    return f"{name or ''}{_MARK}{numbers}{_MARK}{own}" if numbers or own else name


def _ids(given: Any, num_sequences: int) -> list[Any]:
    """The id of each sequence: a list of ids, or that of the record."""
    if getattr(given, "ndim", 0) == 1:
        given = given.tolist()
    if isinstance(given, (list, tuple)):
        return list(given) if len(given) == num_sequences else [None] * num_sequences
    return [given] * num_sequences
