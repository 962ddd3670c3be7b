"""Megatron's data sets, each sample with its channel.

A sample of a blend knows the data set that it came from; that of a single data set has the
channel of the data set; a pack of conversations (`--sft`) has one channel per conversation, read
from the JSONL. Everything is decided where the data loader is built, so that its workers only
look numbers up.

Letters: S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.labels import UNLABELED_ID, LabelTable, channels_of
from channel_metrics.errors import ChannelError, ConfigError
from channel_metrics.trainers.megatron.ids import (
    BATCH_KEY,
    CROSSINGS_KEY,
    NO_SEQUENCE,
    SEQUENCES_KEY,
)
from channel_metrics.trainers.megatron.sft_names import sft_channel_names

__all__ = ["ChannelDataset", "is_sft", "pack_channel_ids"]


class ChannelDataset(torch.utils.data.Dataset[Any]):
    """A Megatron data set whose samples carry `channel_ids`; all else is the data set's own.

    Args:
        dataset: a BlendedDataset, or one data set with a `dataset_path`.
        table: the channels.
        id_of: the id of a data set by its path; None is mock data.
        declare: learns names of channels, before there are workers.
        fields: where a line or a conversation of an SFT file may hold its channel.
        per_token: give one id per token even where all of a row are the same.
    """

    def __init__(
        self,
        dataset: Any,
        table: LabelTable,
        id_of: Callable[[str | None], int],
        *,
        declare: Callable[[Iterable[str]], None],
        fields: Sequence[str],
        per_token: bool = False,
    ) -> None:
        self._dataset = dataset
        self._fields = tuple(fields)
        self._per_token = per_token
        self._table = table
        parts = getattr(dataset, "datasets", None)
        self._is_blend = parts is not None
        self._parts = list(parts) if parts is not None else [dataset]
        named = [is_sft(part) and _declare_names(part, declare, fields) for part in self._parts]
        if is_sft(dataset) and not any(named):
            raise ConfigError(_no_channel(dataset, fields))
        # A conversation without a channel, in a file where others have one, stays unlabeled.
        self._ids = [
            UNLABELED_ID if has_names else id_of(getattr(part, "dataset_path", None))
            for part, has_names in zip(self._parts, named, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before there are any.
        if name.startswith("__") or "_dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = dict(self._dataset[index])
        part, inner = 0, index
        if self._is_blend:
            part = int(sample["dataset_id"])
            inner = int(self._dataset.dataset_sample_index[index])
        if is_sft(self._parts[part]):
            sample.update(self._pack(self._parts[part], inner, sample, self._ids[part]))
        elif self._per_token:
            sample[BATCH_KEY] = torch.full_like(sample["labels"], self._ids[part])
        else:
            sample[BATCH_KEY] = self._ids[part]
        return sample

    def _pack(
        self, part: Any, index: int, sample: Mapping[str, Any], otherwise: int
    ) -> dict[str, Any]:
        line = int(part.indices[index % len(part.indices)])
        conversations = part._split_conversations(part.dataset[line])
        record = _lines(part)[line]
        names = _names(record, conversations, self._fields)
        ids = [otherwise if n is None else self._table.ids([n])[0] for n in names]
        of_target, owners, crossings = pack_channel_ids(
            ids, sample["cu_seqlens"], sample["loss_mask"]
        )
        sequences = torch.full_like(sample["cu_seqlens"], NO_SEQUENCE, dtype=torch.int64)
        sequences[: owners.numel()] = owners
        return {BATCH_KEY: of_target, SEQUENCES_KEY: sequences, CROSSINGS_KEY: crossings}


def is_sft(dataset: Any) -> bool:
    """Whether the samples of `dataset` are packs of conversations."""
    return hasattr(dataset, "_split_conversations") and hasattr(dataset, "indices")


def pack_channel_ids(
    conversation_ids: Sequence[int], cu_seqlens: Tensor, loss_mask: Tensor
) -> tuple[Tensor, Tensor, int]:
    """The channel of the token that each position predicts, int64 [S]; the channel of each
    conversation that was packed; and the crossings.

    conversation_ids: one per conversation, at least as many as were packed. cu_seqlens: int32,
    filled up with S behind the last bound. loss_mask: [S]. The crossings are the supervised
    positions whose target belongs to the next conversation: in Megatron's packs the last one of
    each conversation, unless the prompt format masks it. The padding behind the last
    conversation is not supervised.
    """
    length = loss_mask.shape[0]
    bounds = cu_seqlens.long().clamp(max=length)
    packed = int((bounds.diff() > 0).sum())
    if len(conversation_ids) < packed:
        raise ChannelError(
            f"a pack holds {packed} conversations (cu_seqlens), but its line gives only "
            f"{len(conversation_ids)}; each must start with a system message."
        )
    owners = torch.tensor(conversation_ids[:packed], dtype=torch.int64, device="cpu")
    own = owners.repeat_interleave(bounds.diff()[:packed])
    own = torch.nn.functional.pad(own, (0, length - own.numel()), value=UNLABELED_ID)
    # The last position predicts what was cut off; it has no target, and is not supervised.
    of_target = torch.cat([own[1:], own[-1:]])
    last = bounds[1:packed] - 1
    return of_target, owners, int((loss_mask[last] > 0).sum())


def _lines(part: Any) -> Any:
    """The JSONL behind an SFTDataset, with all columns of its lines."""
    return part.dataset.dataset


def _names(
    record: Mapping[str, Any],
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    fields: Sequence[str],
) -> list[str | None]:
    """One channel per conversation: that of its first message that has one, else the line's."""
    of_line = channels_of(record, fields)
    if len(of_line) not in (1, len(conversations)):
        raise ChannelError(
            f"a line of the SFT file lists {len(of_line)} channels for {len(conversations)} "
            "conversations; give one for the line, or one for each conversation."
        )
    shared = of_line * len(conversations) if len(of_line) == 1 else of_line
    found = []
    for messages, otherwise in zip(conversations, shared, strict=True):
        own = (name for message in messages for name in channels_of(message, fields)[:1] if name)
        found.append(next(own, otherwise))
    return found


def _declare_names(
    part: Any, declare: Callable[[Iterable[str]], None], fields: Sequence[str]
) -> bool:
    """Learn the channels of an SFT file; False where no line has any.

    Data loader workers are other processes: what they would add to the table is lost.
    """
    names = sft_channel_names(_lines(part), fields)
    declare(sorted(names))
    return bool(names)


def _no_channel(dataset: Any, fields: Sequence[str]) -> str:
    return (
        f"no line of the SFT file {getattr(dataset, 'dataset_path', None)!r} has a channel: "
        f"looked for {', '.join(fields)} in its lines and in their messages. Add one of them, or "
        "name the field under `fields` in the file of --channels-config."
    )
