"""Megatron's datasets, with the channel of each sample.

A sample of a blend has the channel of the dataset that it came from. A sample of a single dataset
has the channel of this dataset. A pack of conversations (`--sft`) has one channel per conversation,
which is read from the JSONL file. All ids are assigned before the data loader is built, so that its
workers only look them up.

Letters: S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.labels import UNLABELED, UNLABELED_ID, channels_of
from channel_metrics.core.names import fields_of_channel, joint_name, labels_of_axes
from channel_metrics.errors import ChannelError, ConfigError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.megatron.ids import (
    BATCH_KEY,
    CROSSINGS_KEY,
    NO_SEQUENCE,
    SEQUENCES_KEY,
)
from channel_metrics.trainers.megatron.names import dataset_name
from channel_metrics.trainers.megatron.sft_names import sft_channel_names

__all__ = ["ChannelDataset", "WrappedDataset", "ids_of_pack", "is_sft", "pack_channel_ids"]


class WrappedDataset(torch.utils.data.Dataset[Any]):
    """A dataset around another one, with all attributes of that one.

    Workers of the data loader get a copy of it, so it holds no session.
    """

    def __init__(self, dataset: Any, session: ChannelMetrics) -> None:
        self._dataset, self._table = dataset, session.labels

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before any are set.
        if name.startswith("__") or "_dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._dataset, name)


class ChannelDataset(WrappedDataset):
    """A Megatron dataset whose samples carry `channel_ids`. All else is unchanged.

    Args:
        dataset: a BlendedDataset, or one dataset with a `dataset_path`.
        session: learns the names of the channels, before there are workers.
        names: {path of a dataset: its channel}; the path of mock data is None. Other datasets are
            named by their paths, and join it.
        per_token: whether each token has an id, even if all tokens of a row have the same.

    Raises:
        ConfigError: this is an SFT dataset, and no line of its files has a channel.
    """

    def __init__(
        self,
        dataset: Any,
        session: ChannelMetrics,
        names: dict[str | None, str],
        *,
        per_token: bool = False,
    ) -> None:
        super().__init__(dataset, session)
        self._fields = tuple(session.config.label_fields)
        self._per_token = per_token
        parts = getattr(dataset, "datasets", None)
        self._is_blend = parts is not None
        self._parts = list(parts) if parts is not None else [dataset]
        declare = session.declare_names
        named = [
            is_sft(part) and _declare_names(part, declare, self._fields) for part in self._parts
        ]
        if is_sft(dataset) and not any(named):
            raise ConfigError(_no_channel(dataset, self._fields))
        self._ids: list[int] = []
        for part, has_names in zip(self._parts, named, strict=True):
            # If a file names channels, its conversations without a channel are unlabeled.
            name = UNLABELED
            if not has_names:
                path = getattr(part, "dataset_path", None)
                name = names.setdefault(path, dataset_name(path))
            declare([name])
            self._ids += self._table.ids([name])

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
    """Whether the samples of the Megatron dataset `dataset` are packs of conversations."""
    return hasattr(dataset, "_split_conversations") and hasattr(dataset, "indices")


def pack_channel_ids(
    conversation_ids: Sequence[int], cu_seqlens: Tensor, loss_mask: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Give the tokens of a pack the ids of their conversations.

    A crossing is a supervised position whose target belongs to the next conversation. In Megatron's
    packs, this is the last position of each conversation, unless the prompt format masks it. The
    padding behind the last conversation is not supervised.

    Args:
        conversation_ids: one id per conversation, for at least as many as were packed.
        cu_seqlens: boundaries of the conversations, int32. Entries behind the last bound are S.
        loss_mask: [S], 0 where a token is not supervised.

    Returns:
        The id of the target that each position predicts, int64 [S]; the id of each packed
        conversation, int64; and the number of crossings.

    Raises:
        ChannelError: there are fewer ids than packed conversations.
    """
    length = loss_mask.shape[0]
    bounds = cu_seqlens.long().clamp(max=length)
    packed = int((bounds.diff() > 0).sum())
    own, owners = ids_of_pack(conversation_ids[:packed], bounds.diff()[:packed])
    own = torch.nn.functional.pad(own, (0, length - own.numel()), value=UNLABELED_ID)
    # The last position has no target in this pack, so it is not supervised.
    of_target = torch.cat([own[1:], own[-1:]])
    last = bounds[1:packed] - 1
    return of_target, owners, int((loss_mask[last] > 0).sum())


def ids_of_pack(ids: Sequence[int], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Give the tokens of a pack the ids of their conversations.

    Args:
        ids: one per conversation.
        lengths: the number of tokens of each conversation, int64.

    Returns:
        The id of each token, and of each conversation; both int64.

    Raises:
        ChannelError: there is not one id for each conversation.
    """
    if len(ids) != len(lengths):
        raise ChannelError(
            f"a pack holds {len(lengths)} conversations, but has {len(ids)} channels; give one for "
            "each conversation. With --sft, each conversation must start with a system message."
        )
    owners = torch.tensor(ids, dtype=torch.int64, device="cpu")
    return owners.repeat_interleave(lengths), owners


def _lines(part: Any) -> Any:
    """The lines of the JSONL file of an SFTDataset, with all their columns."""
    return part.dataset.dataset


def _names(
    record: Mapping[str, Any],
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    fields: Sequence[str],
) -> list[str | None]:
    """The joint name of each conversation: from its first message with a label, or the line's."""
    own = fields_of_channel(fields)
    of_line = channels_of(record, own)
    if len(of_line) not in (1, len(conversations)):
        raise ChannelError(
            f"a line of the SFT file lists {len(of_line)} channels for {len(conversations)} "
            "conversations; give one for the line, or one for each conversation."
        )
    shared = of_line * len(conversations) if len(of_line) == 1 else of_line
    labels = labels_of_axes(record, fields, {}, len(conversations))
    found = []
    for messages, otherwise, others in zip(conversations, shared, labels, strict=True):
        names = (name for message in messages for name in channels_of(message, own)[:1] if name)
        of_messages = (labels_of_axes(message, fields, {}, 1)[0] for message in messages)
        first = next((labels for labels in of_messages if labels), others)
        found.append(joint_name(next(names, otherwise), first))
    return found


def _declare_names(
    part: Any, declare: Callable[[Iterable[str]], None], fields: Sequence[str]
) -> bool:
    """Declare the channels of an SFT file. Returns False if no line has a channel.

    Workers of the data loader cannot do this, because they are other processes with a table of
    their own.
    """
    lines = _lines(part)
    if len(fields_of_channel(fields)) < len(fields):
        # Which labels occur together is seen in whole lines only.
        of_lines = (
            _names(lines[i], part._split_conversations(part.dataset[i]), fields)
            for i in range(len(lines))
        )
        names = {name for of_line in of_lines for name in of_line if name is not None}
    else:
        names = sft_channel_names(lines, fields)
    declare(sorted(names))
    return bool(names)


def _no_channel(dataset: Any, fields: Sequence[str]) -> str:
    return (
        f"no line of the SFT file {getattr(dataset, 'dataset_path', None)!r} has a channel: "
        f"looked for {', '.join(fields_of_channel(fields))} in lines and in their messages. Add "
        "one of them, or name the field under `fields` in the file of --channels-config."
    )
