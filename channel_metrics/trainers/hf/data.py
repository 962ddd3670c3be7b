"""The wrapped collator of a transformers Trainer, and the columns that it gets to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from channel_metrics.core.labels import LabelTable, field_roots
from channel_metrics.data.collator import BOUNDS_KEY, RECORDS_KEY, ChannelCollator
from channel_metrics.trainers.hf.batch import has_token_labels

__all__ = ["TokenBatchCollator", "wrap_collator"]


class TokenBatchCollator(ChannelCollator):
    """Leaves a batch as it is if it has no labels of tokens: such a trainer is not for us."""

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        # Copied before: a collator may take fields out of its records.
        records = [dict(one) if isinstance(one, Mapping) else one for one in features]
        batch = collate(features)
        if not isinstance(batch, Mapping) or not has_token_labels(batch):
            return batch
        return super()._with_channels(lambda _: batch, records)


def wrap_collator(
    base: Callable[[list[Any]], Any],
    *,
    fields: Sequence[str],
    table: LabelTable | None,
    signature_columns: Sequence[str],
    remove_unused_columns: bool,
    kind: type[ChannelCollator] = ChannelCollator,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> ChannelCollator:
    """`base` with channels, seeing exactly the columns that it would see without us.

    With `remove_unused_columns` the trainer would have dropped the channel's column, so it is
    stripped; transformers' and TRL's own collators can only choke on it; any other collator
    gets what it always got.
    """
    theirs = type(base).__module__.split(".")[0] in ("transformers", "trl") or (
        getattr(base, "__module__", "").split(".")[0] in ("transformers", "trl")
    )
    drop = remove_unused_columns or theirs
    strip = [root for root in field_roots(fields) if drop and root not in signature_columns]
    return kind(
        base,
        fields=fields,
        table=table,
        strip=strip,
        bounds_key=BOUNDS_KEY,
        row_bounds=False,
        carry_faults=True,
        classes=classes,
        records_key=RECORDS_KEY,
    )
