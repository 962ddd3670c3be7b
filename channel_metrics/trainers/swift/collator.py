"""Channels and boundaries in the batches that ms-swift's template makes.

The template keeps the channel of each sequence in the batch: `channel` is a list of names, in the
order of the sequences. The collator makes ids and boundaries of it, on the host. Rows may be
padded, packed or padding-free.

Batches of `GroupedPackingDataset` are supported, too. In these, `packed_group` has one name per
pack, and `packed_segments` has the tokens of each pack (one number, or one per sequence).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from channel_metrics.core.axis_settings import ROLES, ROLES_FIELD
from channel_metrics.core.boundaries import Boundaries, boundaries_from_batch
from channel_metrics.core.labels import channels_of
from channel_metrics.data.carried import split_roles, without_carried
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ChannelError

__all__ = ["GROUP_KEY", "SEGMENTS_KEY", "SwiftCollator", "text_positions"]

GROUP_KEY, SEGMENTS_KEY = "packed_group", "packed_segments"
# In an evaluation that generates answers, the collator returns the records under this key.
_RECORDS_KEY = "_data"

Names = list[list[str | None]]


class SwiftCollator(ChannelCollator):
    """Wraps `template.data_collator`, and adds `channels` and boundaries from its `channel`.

    ms-swift's own keys stay in the batch.
    """

    def _with_channels(self, collate: Callable[..., Any], features: Sequence[Any]) -> Any:
        batch = collate(features)
        if _RECORDS_KEY not in batch:
            view = {**batch, "position_ids": text_positions(batch)}
            boundaries = boundaries_from_batch(view)
            names = _names(batch, boundaries, self.classes)
            records: list[dict[str, Any]] = []
            if self.columns:
                _refuse_packs(batch)
                pairs = [split_roles(name) for (name,) in names]
                names, records = [[name] for name, _ in pairs], [_record(of) for _, of in pairs]
            batch.update(self._added_keys(view, names, records))
            if (self.carried or self.columns) and batch.get("channel") is not None:
                batch["channel"] = [without_carried(name) for name in batch["channel"]]
        return batch


def text_positions(batch: Mapping[str, Any]) -> Any:
    """The positions of the tokens. Multimodal models have them beside their own position ids."""
    positions = batch.get("text_position_ids")
    return batch.get("position_ids") if positions is None else positions


def _refuse_packs(batch: Mapping[str, Any]) -> None:
    if batch.get(GROUP_KEY) is not None:
        raise ChannelError(
            f"{GROUP_KEY} has one name per pack, so the roles of its sequences are not known; "
            "leave out the axis by template, or use `--packing true`."
        )


def _record(roles: list[int] | None) -> dict[str, Any]:
    """What the labels of the tokens are read from, as if it was a column."""
    names = None if roles is None else [ROLES[role - 1] if role else None for role in roles]
    return {ROLES_FIELD: names}


def _names(
    batch: Mapping[str, Any], boundaries: Boundaries, classes: Mapping[str, Sequence[str]]
) -> Names:
    """The channels of the sequences, in one list per record, for `ChannelCollator`."""
    if batch.get(GROUP_KEY) is not None:
        return _names_of_packs(batch, boundaries)
    channel = batch.get("channel")
    if channel is None:
        return [[None]] * boundaries.num_sequences
    return [[name] for name in channels_of({"channel": list(channel)}, ("channel",), classes)]


def _names_of_packs(batch: Mapping[str, Any], boundaries: Boundaries) -> Names:
    groups = channels_of({"group": _as_list(batch[GROUP_KEY])}, ("group",))
    lengths = [_total(segments) for segments in _as_list(batch.get(SEGMENTS_KEY, ()))]
    if len(lengths) != len(groups):
        raise ChannelError(
            f"{GROUP_KEY} names {len(groups)} groups, but {SEGMENTS_KEY} has {len(lengths)} "
            "entries; they must have one entry per pack."
        )
    rows = batch["labels" if "labels" in batch else "input_ids"].shape[0]
    if rows == len(groups) and rows > 1:
        return [[group] for group in groups]
    bounds = _bounds_without_padding(batch, boundaries, rows)
    ends = list(accumulate(lengths))
    if not set(ends) <= set(bounds):
        raise ChannelError(
            f"{SEGMENTS_KEY} lets packs end at {ends[:8]}, but sequences begin and end at "
            f"{bounds[:8]}; a pack must hold whole sequences."
        )
    # Padding follows the last pack.
    starts = [start for start in bounds[:-1] if start < ends[-1]]
    held = Counter(bisect_right(ends, start) for start in starts)
    return [[group] * held[pack] for pack, group in enumerate(groups)]


def _bounds_without_padding(
    batch: Mapping[str, Any], boundaries: Boundaries, rows: int
) -> list[int]:
    """The boundaries of the sequences in the tokens of all packs, without padding."""
    mask = batch.get("attention_mask")
    if rows == 1 or rows != boundaries.num_sequences or mask is None:
        return [int(bound) for bound in boundaries.cu_seqlens.tolist()]
    return [0, *accumulate(int(length) for length in (mask != 0).sum(-1).tolist())]


def _as_list(values: Any) -> list[Any]:
    if isinstance(values, str):
        return [values]
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _total(segments: Any) -> int:
    return int(sum(segments)) if isinstance(segments, (list, tuple)) else int(segments)
