"""The channels of one micro-batch in ms-swift's Megatron trainer, in the layout of its labels.

ms-swift keeps the channel of each sequence in the batch: `channel` has names, in the order of the
sequences. It shifts the labels by one, and cuts them for context parallelism. Here the channels
get the same shift and cut. All of this happens on the host, without waiting for a device.

Letters: B rows, S row length (one row of packed sequences has B = 1), N = num_sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.boundaries import token_channel_ids
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.labels import LabelTable, channels_of
from channel_metrics.core.places import Places, places
from channel_metrics.errors import BoundaryError, ChannelError
from channel_metrics.trainers.swift.collator import text_positions

__all__ = ["SequenceChannels", "sequence_channels"]


class SequenceChannels(list[str | None]):
    """ms-swift's list of the channels of N sequences, with their ids.

    It replaces ms-swift's own list, which goes from the batch to the loss function.

    ids: int64, one per row [B], one per sequence [N] between `cu_seqlens`, or one per label
        [B, S / context-parallel size].
    cu_seqlens: int32 [N + 1], boundaries in the shifted labels; None without packing.
    sequences: int64 [N], the ids of the sequences, if `ids` has one per label.
    places: where the targets stand in their sequences, as one entry per label; None if no axis
        needs it.
    num_crossings: the number of supervised labels that are the first token of the next sequence.
    """

    def __init__(self, names: list[str | None], ids: Tensor) -> None:
        super().__init__(names)
        self.ids = ids
        self.cu_seqlens: Tensor | None = None
        self.sequences: Tensor | None = None
        self.places: Places | None = None
        self.num_crossings = 0


def sequence_channels(
    args: Any,
    given: Mapping[str, Any],
    table: LabelTable,
    classes: Mapping[str, Sequence[str]] | None = None,
    *,
    with_places: bool = False,
) -> SequenceChannels:
    """The channels of a micro-batch.

    Args:
        args: the arguments of the run.
        given: the micro-batch before ms-swift prepares it. Its `labels` [B, S] are not shifted.
        table: turns names into ids.
        classes: the names of the classes, if the channels are numbers of classes.
        with_places: whether an axis needs the places of the tokens.

    Raises:
        ChannelError: if there is not one channel per sequence.
        BoundaryError: if the number of sequences is not known, or does not fit the positions.
    """
    labels = given["labels"].cpu()
    packed = _packed_seq_params(args, given)
    held_in = None if packed is None else "sequences of the pack"
    names = _names(given, held_in, len(labels), classes)
    ids = torch.tensor(table.ids(names), dtype=torch.int64, device="cpu")
    found = SequenceChannels(names, ids)
    bounds = None if packed is None else packed.cu_seqlens_q[: len(names) + 1]
    if bounds is not None:
        _check_bounds(bounds, found, given.get("seq_lens"))
        found.num_crossings = int((labels[0, bounds[1:-1].long()] != IGNORE_INDEX).sum())
        # A shifted label is one position before its token.
        found.cu_seqlens = (bounds - 1).clamp(min=0)
    if with_places:
        keep = None if bounds is None else _kept(bounds, given.get("seq_lens"), labels.shape)
        found.places = places(labels.shape, bounds, keep, labels).of_next()
    if args.context_parallel_size > 1:
        _cut_with_labels(args, found, labels, bounds, packed)
    return found


def _cut_with_labels(
    args: Any, found: SequenceChannels, labels: Tensor, bounds: Tensor | None, packed: Any
) -> None:
    """Replace `ids` by one id per label. ms-swift's own function cuts them like the labels."""
    # Looked up where ms-swift calls it, because a user may have replaced it.
    from swift.megatron.trainers import utils

    if bounds is None:
        ids = found.ids.unsqueeze(1).expand(labels.shape)
    else:
        ids = token_channel_ids(found.ids, bounds, labels.numel()).view(labels.shape)

    def cut(of_labels: Tensor) -> Tensor:
        in_place_of_labels = {"labels": of_labels, "packed_seq_params": packed}
        part: Tensor = utils.get_batch_on_this_cp_rank(args, in_place_of_labels)["labels"]
        return part

    found.sequences, found.cu_seqlens = found.ids, None
    found.ids = cut(ids.roll(-1, dims=-1))
    found.places = None if found.places is None else found.places.map(cut)


def _kept(bounds: Tensor, lengths: Any, shape: torch.Size) -> Tensor | None:
    """bool [B, S], False for the padding behind each sequence; None if there is none known."""
    if lengths is None:
        return None
    keep = torch.zeros(shape.numel(), dtype=torch.bool, device="cpu")
    for start, length in zip(bounds[:-1].tolist(), lengths, strict=True):
        keep[start : start + int(length)] = True
    return keep.view(shape)


def _packed_seq_params(args: Any, given: Mapping[str, Any]) -> Any:
    """The parameters that ms-swift derives from the positions, on the host; None for padding."""
    positions = text_positions(given)
    if not args.padding_free or positions is None:
        return None
    from swift.megatron.utils import get_packed_seq_params

    return get_packed_seq_params(args, positions.cpu())


def _names(
    given: Mapping[str, Any],
    held_in: str | None,
    num_rows: int,
    classes: Mapping[str, Sequence[str]] | None,
) -> list[str | None]:
    num_sequences: int | None = num_rows
    if held_in is not None:
        lengths = given.get("seq_lens")
        num_sequences = given.get("num_samples") if lengths is None else len(lengths)
    names = given.get("channel")
    if num_sequences is None:
        raise BoundaryError(
            "a batch of packed sequences must say how many there are, in seq_lens (as ms-swift's "
            f"own collator does) or num_samples, but it holds {', '.join(given)}; add one of them, "
            "because the padding after the last sequence looks like sequences, too."
        )
    if names is None:
        return [None] * num_sequences
    names = channels_of({"channel": list(names)}, ("channel",), classes)
    if len(names) != num_sequences:
        raise ChannelError(
            f"channel has {len(names)} entries but the batch holds {num_sequences} "
            f"{held_in or 'rows'}; a collator of your own must give one channel per sequence, in "
            "their order."
        )
    return names


def _check_bounds(bounds: Tensor, found: SequenceChannels, lengths: Any) -> None:
    """lengths: of the sequences without their padding, if the batch has them."""
    remedy = "positions of each sequence must count from 0, and nowhere else."
    if bounds.numel() != len(found) + 1:
        raise BoundaryError(
            f"the batch names {len(found)} sequences, but its position_ids start anew "
            f"{bounds.numel() - 1} times; {remedy}"
        )
    for number, length in enumerate(() if lengths is None else lengths):
        held = int(bounds[number + 1] - bounds[number])
        if held < int(length):
            raise BoundaryError(
                f"sequence {number} of the batch has {int(length)} tokens (seq_lens), but its "
                f"position_ids start anew after {held}; {remedy}"
            )
