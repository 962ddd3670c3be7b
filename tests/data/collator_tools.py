"""Records whose tokens tell them apart, and collators over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Record = dict[str, Any]
Base = Callable[[list[Record]], dict[str, Any]]


def record(length: int, channel: str | None, first: int = 100) -> Record:
    """Tokens that no record of another `first` has; each label is its token."""
    return {"input_ids": list(range(first, first + length)), "channel": channel}


def padded(records: list[Record], *, left: bool = False, mask: bool = True) -> dict[str, Any]:
    """Rows, padded with 0; labels are the tokens if not given, and -100 at pads."""
    width = max(len(r["input_ids"]) for r in records)
    values: Any
    batch: dict[str, list[Any]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for r in records:
        ids = r["input_ids"]
        for key, values, pad in (
            ("input_ids", ids, 0),
            ("labels", r.get("labels", ids), -100),
            ("attention_mask", [1] * len(ids), 0),
        ):
            fill = [pad] * (width - len(ids))
            batch[key].append([*fill, *values] if left else [*values, *fill])
    if not mask:
        del batch["attention_mask"]
    return {key: torch.tensor(rows) for key, rows in batch.items()}


def longest_first(records: list[Record], base: Base = padded) -> dict[str, Any]:
    return base(sorted(records, key=lambda r: -len(r["input_ids"])))


def left(records: list[Record]) -> dict[str, Any]:
    return padded(records, left=True)


def unmasked(records: list[Record]) -> dict[str, Any]:
    return padded(records, mask=False)


def unmasked_left(records: list[Record]) -> dict[str, Any]:
    return padded(records, mask=False, left=True)
