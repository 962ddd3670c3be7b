"""Axes whose labels belong to single tokens, and not to records.

    axes:
      position: {by: position}
      length: {by: length}
      role: {by: column, field: roles}
      modality: {by: modality}

The sums of their labels are rows of the same table as those of channels, so they are added up over
steps and ranks as these are. A row of a token axis holds the tokens once more, and belongs to no
channel. Values that need whole sequences, such as `samples`, are left out for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.axis_settings import (
    COLUMN,
    LENGTH,
    MODALITIES,
    MODALITY,
    POSITION,
    TEXT,
    Source,
    token_source,
)
from channel_metrics.core.labels import UNLABELED, LabelTable
from channel_metrics.core.names import token_name
from channel_metrics.core.places import NUM_BUCKETS, Places, bucket_name, buckets
from channel_metrics.errors import ChannelError, ConfigError

__all__ = ["TokenAxes", "TokenColumn"]

# A field of the records, and the mark of each of its labels.
TokenColumn = tuple[str, Mapping[Any, int]]


class TokenAxes:
    """The token axes of a session.

    Args:
        axes: all axes of the config. Others than those `by` something are left aside.
    """

    def __init__(self, axes: Mapping[str, Source]) -> None:
        self._sources: dict[str, Mapping[str, Any]] = {
            axis: one
            for axis, one in axes.items()
            if isinstance(one, Mapping) and token_source(one)
        }
        self._shifts = {axis: 8 * i for i, axis in enumerate(self._by(COLUMN))}
        # {kind: the ids of its tokens}, from the tokenizer or the model.
        self._modalities: dict[str, list[int]] = {}
        # {(device, axis): the ids of its rows} and {(device, axis): the label of each token id}
        self._rows: dict[tuple[torch.device, str], Tensor] = {}
        self._kinds: dict[tuple[torch.device, str], Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    @property
    def of_places(self) -> list[str]:
        """The axes that need to know where a token stands."""
        return self._by(POSITION, LENGTH)

    @property
    def of_targets(self) -> list[str]:
        """The axes that need the token that each loss is about."""
        return self._by(MODALITY)

    @property
    def columns(self) -> Sequence[TokenColumn]:
        """For each axis from a column of the records: the field, and the mark of each label.

        Each axis has 8 bits of the marks of a token. 0 there stands for no label.
        """
        found: list[TokenColumn] = []
        for axis, shift in self._shifts.items():
            source, names = self._sources[axis], self._labels(axis)
            marks = {v: (names.index(name) + 1) << shift for v, name in source["labels"].items()}
            found.append((source["field"], marks))
        return found

    def read_ids(self, *sources: Any) -> None:
        """Learn which token ids stand for images, videos and audio.

        Args:
            sources: processors, tokenizers or configs of models. The first that knows an id is
                taken, and what was learned before stays.
        """
        for kind in MODALITIES if self.of_targets else ():
            ids = [one for source in sources if (one := _id_of(source, kind)) is not None]
            if ids:
                self._modalities.setdefault(kind, ids[:1])

    def groups(
        self,
        labels: LabelTable,
        like: Tensor,
        *,
        places: Places | None,
        marks: Tensor | None,
        targets: Tensor | None,
    ) -> list[Tensor]:
        """For each axis the ids of the tokens, int64 [T]. Nothing waits for the device.

        Args:
            labels: the table of the ids. The names of the axes join it.
            like: a tensor on the device of the result.
            places: where the tokens stand. Without it, axes that need it are left out.
            marks: the labels of the tokens from columns of the records, see `columns`.
            targets: the ids of the tokens, int64.

        Raises:
            ChannelError: an axis is read from a column, or from the ids of the tokens, and the
                batch does not have these.
            ConfigError: no token id of an image, a video or audio is known.
        """
        found = []
        for axis in self:
            if places is None and axis in self.of_places:
                continue
            key = like.device, axis
            if key not in self._rows:
                *rows, none = labels.add_all(self.names(axis))
                self._rows[key] = torch.tensor([none, *rows], device=like.device)
            if axis in self.of_places:
                assert places is not None
                by_position = token_source(self._sources[axis]) == POSITION
                number = buckets(places.positions if by_position else places.lengths) + 1
            elif axis in self._shifts:
                number = self._given(axis, marks, like) >> self._shifts[axis] & 255
            else:
                number = self._modality(axis, targets, like)
            # 0 stands for no label.
            found.append(self._rows[key].index_select(0, number.flatten()))
        return found

    def names(self, axis: str) -> list[str]:
        """What the rows of an axis are called in a label table. The last one is `unlabeled`."""
        return [token_name(axis, label) for label in (*self._labels(axis), UNLABELED)]

    def _given(self, axis: str, marks: Tensor | None, like: Tensor) -> Tensor:
        if marks is None:
            raise ChannelError(
                f"axis {axis!r} needs a label per token ({self._sources[axis]['field']!r}), but "
                "the batch does not have them: they ride with the collator of "
                "`metrics.collator`, of transformers' Trainer and of TRL's SFTTrainer. Take this "
                "axis out of `axes` here."
            )
        return marks.to(like.device, non_blocking=True)

    def _modality(self, axis: str, targets: Tensor | None, like: Tensor) -> Tensor:
        """The number of the label of each token, from 1 on, by its id."""
        if targets is None:
            raise ChannelError(
                f"axis {axis!r} needs the ids of the tokens: give micro-batches their `labels`."
            )
        key = like.device, axis
        if key not in self._kinds:
            self._kinds[key] = self._kind_of_ids(axis).to(like.device)
        kinds = self._kinds[key]
        return kinds[targets.to(like.device, non_blocking=True).clamp(0, len(kinds) - 1)]

    def _kind_of_ids(self, axis: str) -> Tensor:
        """int64: for each token id the number of its label, from 1 on. The last entry is for all
        higher ids."""
        given = self._sources[axis].get("labels", self._modalities)
        if not given:
            raise ConfigError(
                f"axis {axis!r} needs the token ids of images, videos or audio, but neither the "
                "processor nor the config of the model names one; give them in the config: "
                f"axes: {{{axis}: {{by: {MODALITY}, labels: {{image: 151655}}}}}}."
            )
        numbers = {name: number for number, name in enumerate(self._labels(axis), start=1)}
        ids = [i for of_kind in given.values() for i in of_kind]
        kinds = torch.full((max(ids) + 2,), numbers[TEXT], dtype=torch.int64, device="cpu")
        for name, of_kind in given.items():
            kinds[list(of_kind)] = numbers[name]
        return kinds

    def _by(self, *kinds: str) -> list[str]:
        return [axis for axis, one in self._sources.items() if token_source(one) in kinds]

    def _labels(self, axis: str) -> list[str]:
        source = self._sources[axis]
        if token_source(source) == COLUMN:
            return list(dict.fromkeys(source["labels"].values()))
        if token_source(source) == MODALITY:
            return list(dict.fromkeys((TEXT, *source.get("labels", MODALITIES))))
        return [bucket_name(number) for number in range(NUM_BUCKETS)]


def _id_of(source: Any, kind: str) -> int | None:
    """The id of the token that stands for an image, a video or audio; None if it is not known."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        found = getattr(source, name, None)
        if isinstance(found, int):
            return found
    return None
