"""The wrapped collator of a transformers Trainer, and the dataset columns that it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from channel_metrics.core.labels import LabelTable, field_columns, field_roots
from channel_metrics.core.token_axes import TokenColumn
from channel_metrics.data.batch_channels import COLUMNS_KEY, BatchChannels
from channel_metrics.data.carried import INDEX, Carried
from channel_metrics.data.collator import BOUNDS_KEY, RECORDS_KEY, ChannelCollator
from channel_metrics.errors import ChannelError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.batch import Scratch, has_token_labels

__all__ = ["TokenBatchCollator", "check_columns", "wrap_collator"]

# Packages whose collators raise errors on columns of strings.
_NO_STRINGS = ("transformers", "trl", "llamafactory", "axolotl")


class TokenBatchCollator(ChannelCollator):
    """Adds channels only to batches that have one label per token.

    If no record has any of `fields`, it adds the names of their columns, too.
    """

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        # Copied first, because a collator may remove fields from its records.
        records = [dict(one) if isinstance(one, Mapping) else one for one in features]
        batch = collate(features)
        if not isinstance(batch, Mapping) or not has_token_labels(batch):
            return batch
        given = "channels" in batch
        batch = super()._with_channels(lambda _: batch, records)
        columns = {key for one in records if isinstance(one, Mapping) for key in one}
        if columns and not given and columns.isdisjoint(field_columns(self.fields)):
            batch[COLUMNS_KEY] = sorted(columns)
        return batch


def check_columns(session: ChannelMetrics, scratch: Scratch, batch: BatchChannels) -> None:
    """Check the first training batch of a dataset that could not be scanned beforehand.

    Args:
        session: the metrics of the trainer.
        scratch: what is known of the batches before.
        batch: the channels of the batch.

    Raises:
        ChannelError: its records have no column that may hold a channel.
    """
    if scratch.has_columns or session.labels.names:
        return
    if batch.columns:
        raise ChannelError(
            "no record of the first batch has a channel: looked for "
            f"{', '.join(session.config.fields)}, found columns {', '.join(batch.columns)}; set "
            "`fields` to the one that names the source."
        )
    scratch.has_columns = True


def wrap_collator(
    base: Callable[[list[Any]], Any],
    *,
    fields: Sequence[str],
    table: LabelTable | None,
    signature_columns: Sequence[str],
    remove_unused_columns: bool,
    kind: type[ChannelCollator] = ChannelCollator,
    classes: Mapping[str, Sequence[str]] | None = None,
    columns: Sequence[TokenColumn] = (),
    carried: Carried | None = None,
) -> ChannelCollator:
    """Wrap a collator so that its batches carry channels.

    `base` gets the same dataset columns as without the metrics. With `remove_unused_columns`, the
    trainer would drop the column of the channel, so the wrapper drops it. It also drops it for
    the collators of transformers, TRL, LLaMA-Factory and Axolotl, which raise errors on strings.
    Any other collator gets all columns.

    Args:
        base: the collator of the trainer.
        fields: the record fields that may hold the channel.
        table: turns names into ids; None keeps the names.
        signature_columns: the columns that the trainer keeps.
        remove_unused_columns: the training argument of that name.
        kind: the class of the wrapper.
        classes: {field: class names} of the dataset columns of type `ClassLabel`.
        columns: the columns with a label per token.
        carried: joins channels with what travels with them.
    """
    modules = (type(base).__module__, getattr(base, "__module__", ""))
    theirs = any(module.split(".")[0] in _NO_STRINGS for module in modules)
    drop = remove_unused_columns or theirs
    of_tokens = [field for field, _ in columns]
    roots = (*field_roots([*fields, *of_tokens]), *(carried.roots if carried else ()))
    strip = [r for r in roots if r == INDEX or (drop and r not in signature_columns)]
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
        columns=columns,
        carried=carried,
    )
