"""The wrapped collator of a transformers Trainer, and the dataset columns that it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from channel_metrics.core.labels import LabelTable, field_roots
from channel_metrics.data.collator import BOUNDS_KEY, RECORDS_KEY, ChannelCollator
from channel_metrics.trainers.hf.batch import has_token_labels

__all__ = ["TokenBatchCollator", "wrap_collator"]


class TokenBatchCollator(ChannelCollator):
    """Adds channels only to batches that have one label per token."""

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        # Copied first, because a collator may remove fields from its records.
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
    """Wrap a collator so that its batches carry channels.

    `base` gets the same dataset columns as without the metrics. With `remove_unused_columns`, the
    trainer would drop the column of the channel, so the wrapper drops it. It also drops it for
    the collators of transformers and TRL, which raise errors on strings. Any other collator gets
    all columns.

    Args:
        base: the collator of the trainer.
        fields: the record fields that may hold the channel.
        table: turns names into ids; None keeps the names.
        signature_columns: the columns that the trainer keeps.
        remove_unused_columns: the training argument of that name.
        kind: the class of the wrapper.
        classes: {field: class names} of the dataset columns of type `ClassLabel`.
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
