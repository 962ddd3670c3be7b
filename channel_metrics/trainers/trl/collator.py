"""Collators for records that are not one row each, such as preference pairs, and for TRL's packs.

Letters: B rows, S row length, T = B * S, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.boundaries import Boundaries, boundaries_from_batch
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.labels import UNLABELED_ID, LabelTable, channel_of
from channel_metrics.data.collator import BOUNDS_KEY, ChannelCollator
from channel_metrics.data.token_marks import MARKS_KEY, marks_of_targets
from channel_metrics.errors import ChannelError
from channel_metrics.trainers.hf.parallel import target_ids

__all__ = ["PACK_BOUNDS_KEY", "TOKEN_FIELD", "PackCollator", "RecordCollator"]

# The dataset column with the channel of each token, as indices into the names of the packer.
TOKEN_FIELD = "channel_ids"
_LENGTHS_FIELD = "seq_lengths"
# The batch key for the bounds of the packs in the flattened rows.
PACK_BOUNDS_KEY = "channel_pack_bounds"


class RecordCollator(ChannelCollator):
    """One channel per record, even if the wrapped collator makes several rows of a record.

    With packing in ms-swift, each feature is a list of records.
    """

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        packs = [feature if isinstance(feature, list) else [feature] for feature in features]
        names = [channel_of(record, self.fields, self.classes) for pack in packs for record in pack]
        batch = collate(features)
        batch["channels"] = self._ids_or_names(names)
        return batch


class PackCollator(ChannelCollator):
    """Channels of packs that hold one channel index per token.

    If the batch has the bounds of the sequences in a pack, `channels` has one id per sequence. If
    not (cut sequences, rows without bounds), it has ids [B, S]: for each position, the channel of
    the token that it predicts, see `target_ids`.

    Args:
        base: the wrapped collator.
        names: the names that the indices stand for; -1 is unlabeled.
        table: turns the names into ids.
        with_marks: whether the packs hold a column with the labels of their tokens.
    """

    def __init__(
        self,
        base: Callable[[list[Any]], Any],
        *,
        names: Sequence[str],
        table: LabelTable,
        with_marks: bool = False,
    ) -> None:
        super().__init__(
            base,
            fields=(TOKEN_FIELD,),
            table=table,
            bounds_key=BOUNDS_KEY,
            carry_faults=True,
            columns=[(MARKS_KEY, {})] if with_marks else (),
        )
        self.names = tuple(names)
        # Index -1 reads the last entry.
        ids = [*table.ids(names), UNLABELED_ID]
        self._ids = torch.tensor(ids, dtype=torch.int64, device="cpu")

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        tokens = _of_packs(features, TOKEN_FIELD)
        marks = _of_packs(features, MARKS_KEY) if self.columns else None
        lengths = [int(n) for record in features for n in record.get(_LENGTHS_FIELD) or ()]
        batch = collate(features)
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ChannelError(
                f"a packed batch must hold `labels`, but holds {', '.join(batch)}, so the channels "
                "of its tokens cannot be matched; use TRL's own collator."
            )
        boundaries = boundaries_from_batch(batch)
        flat = self._ids[torch.cat(tokens)]
        count = len(lengths)
        added = {PACK_BOUNDS_KEY: _pack_bounds([len(of_pack) for of_pack in tokens], labels)}
        if lengths and boundaries.cu_seqlens.diff()[:count].tolist() == lengths:
            bounds = boundaries.cu_seqlens[: count + 1]
            self._check_labels(labels, Boundaries(bounds, boundaries.keep))
            added |= {"channels": flat[bounds[:-1].long()], self.bounds_key: bounds}
        else:
            added["channels"] = target_ids(_as_labels(flat, boundaries.keep, labels))
        if marks is not None:
            placed = _as_labels(torch.cat(marks), boundaries.keep, labels, fill=0)
            added[MARKS_KEY] = marks_of_targets(placed) if added["channels"].dim() == 2 else placed
        batch.update(added)
        return batch


def _of_packs(records: Sequence[Mapping[str, Any]], field: str) -> list[Tensor]:
    """A column with one entry per token, int64."""
    for record in records:
        if field not in record or len(record[field]) != len(record["input_ids"]):
            raise ChannelError(
                f"a packed record must have one entry of {field!r} per token, but has columns "
                f"{', '.join(record)}; something between the packing and the collator dropped or "
                "changed it."
            )
    return [torch.as_tensor(one[field], dtype=torch.int64, device="cpu") for one in records]


def _as_labels(
    flat: Tensor, keep: Tensor | None, labels: Tensor, *, fill: int = UNLABELED_ID
) -> Tensor:
    """The ids of all real tokens, in order, at the positions of their `labels` [B, S]."""
    placed = torch.full((labels.numel(),), fill, dtype=torch.int64, device="cpu")
    if keep is None:
        where = torch.arange(labels.numel(), device="cpu")
    else:
        where = keep.flatten().nonzero().flatten()
    # A padding-free row may end in padding that no mask shows. Its labels are ignored.
    surplus = labels.flatten()[where[flat.numel() :]]
    if where.numel() < flat.numel() or bool((surplus != IGNORE_INDEX).any()):
        raise ChannelError(
            f"the packs hold {flat.numel()} tokens, but the batch {where.numel()} (labels of "
            f"shape {list(labels.shape)}); a collator that cuts or adds tokens must do the same "
            f"to {TOKEN_FIELD!r}."
        )
    placed[where[: flat.numel()]] = flat
    return placed.view(labels.shape)


def _pack_bounds(lengths: list[int], labels: Tensor) -> Tensor:
    """int64 [packs + 1]: the bounds of the rows or, if one row holds all packs, of their tokens."""
    if labels.shape[0] == len(lengths):
        return torch.arange(len(lengths) + 1, device="cpu") * labels.shape[-1]
    return torch.tensor([0, *lengths], device="cpu").cumsum(0)
