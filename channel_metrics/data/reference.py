"""The losses of a reference model, which travel with the sequences of a batch.

They come from the fields `ref_nll` and `ref_tokens` of a record, or from a table by id.
`channel-metrics reference` makes both. How they travel is in `data.carried`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.names import look_up
from channel_metrics.errors import ChannelError, ConfigError

__all__ = ["NO_PAIR", "REFERENCE_KEY", "Pair", "Reference", "numbers_of", "reference_of"]

# The batch key: float64 [N, 2], as int64, because trainers cast floats to the model's dtype.
REFERENCE_KEY = "channel_reference"

Pair = tuple[float, float]
# Of a sequence whose numbers are not known.
NO_PAIR = (math.nan, math.nan)


class Reference:
    """Finds (nll, tokens) of the reference model for the sequences of a record.

    Args:
        table: {id: (nll, tokens)}; None if the records hold them.
        id_field: the dotted field of a record with its id.
    """

    def __init__(self, table: Mapping[str, Pair] | None = None, id_field: str = "id") -> None:
        self.table, self.id_field = table, id_field

    @property
    def own_fields(self) -> tuple[str, ...]:
        """The fields of a record that nobody else needs."""
        return () if self.table is not None else ("ref_nll", "ref_tokens")

    @property
    def roots(self) -> tuple[str, ...]:
        """The fields of a record that are read; of a dotted one, its first part."""
        return self.own_fields or (self.id_field.split(".", 1)[0],)

    def pairs(self, record: Mapping[str, Any], num_sequences: int) -> list[Pair]:
        """(nll, tokens) of each sequence of a record; `NO_PAIR` where they are not known.

        Raises:
            ChannelError: a record lists the numbers of more or fewer sequences than it has.
        """
        if self.table is not None:
            found = self.table.get(str(look_up(record, self.id_field)), NO_PAIR)
            return [found if num_sequences == 1 else NO_PAIR] * num_sequences
        nll, tokens = (_listed(record.get(field)) for field in self.own_fields)
        if len(nll) != len(tokens) or (len(nll) > 1 and len(nll) != num_sequences):
            raise ChannelError(
                f"a record of {num_sequences} sequences lists {len(nll)} `ref_nll` and "
                f"{len(tokens)} `ref_tokens`; give one of each per sequence."
            )
        pairs = [_pair(*one) for one in zip(nll, tokens, strict=True)]
        # One number for several sequences cannot be shared out.
        return pairs if len(pairs) == num_sequences else [NO_PAIR] * num_sequences


def numbers_of(held: Tensor | None) -> Tensor | None:
    """float64 [N, 2], (nll, tokens), from what `REFERENCE_KEY` holds; None without float64."""
    return None if held is None or held.device.type == "mps" else held.view(torch.float64)


def reference_of(config: MetricsConfig) -> Reference | None:
    """What finds the numbers for this config; None if no metric needs them.

    Raises:
        ConfigError: the table cannot be read.
    """
    if not config.with_reference:
        return None
    if not config.reference:
        return Reference()
    return Reference(_table(config.reference, config.reference_id), config.reference_id)


@lru_cache(maxsize=4)
def _table(path: str, id_field: str) -> dict[str, Pair]:
    """{id: (nll, tokens)} of a file of JSON lines."""
    found: dict[str, Pair] = {}
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                record = json.loads(line)
                name = look_up(record, id_field)
                pair = _pair(record["ref_nll"], record["ref_tokens"])
                if name is None or found.setdefault(str(name), pair) != pair:
                    raise ConfigError(
                        f"{path}:{number}: expected one line per {id_field!r}, but this one has "
                        f"{'none' if name is None else f'{name!r} again, with other numbers'}."
                    )
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"reference must be a file of JSON lines with {id_field!r}, 'ref_nll' and "
            f"'ref_tokens', but {path} cannot be read so ({error!r}); "
            "`channel-metrics reference` writes one."
        ) from None
    return found


def _listed(value: Any) -> list[Any]:
    if getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _pair(nll: Any, tokens: Any) -> Pair:
    if nll is None or tokens is None:
        return NO_PAIR
    return float(nll), float(tokens)
