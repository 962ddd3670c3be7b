"""What the mixin remembers about a batch, and which labels it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from channel_metrics.capture.logits import shifted_labels
from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.data.batch_channels import BatchChannels
from channel_metrics.data.collator_fault import CollatorFault

__all__ = ["Scratch", "has_token_labels", "labels_of"]


@dataclass
class Scratch:
    """What the mixin remembers about the current micro-batch.

    Args:
        reader: reads the token losses of the model.
        pending: the channels that were taken out of the batch, until they are counted.
        cut: whether context parallelism cuts the rows of the next loss.
        logs_next: whether the training loop itself makes the next log.
        own_keys: the keys that we have added to the results of evaluations.
        has_columns: whether a training batch had a column that may hold a channel.
        compared: whether a loss that could not be captured was compared with what is counted.
        no_totals: the checkpoint of this run, if it has no totals and nobody was warned of it yet.
    """

    reader: TokenLossReader
    pending: BatchChannels | CollatorFault | None = None
    cut: bool = False
    logs_next: bool = False
    own_keys: set[str] = field(default_factory=set)
    has_columns: bool = False
    compared: bool = False
    no_totals: Path | None = None


def has_token_labels(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch has one label per token.

    Args:
        inputs: the batch.

    Returns:
        False for the labels of a classifier or a regressor, and for a batch without labels.
    """
    labels, ids = inputs.get("labels"), inputs.get("input_ids")
    if labels is None:
        labels = inputs.get("shift_labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return labels.dim() == 2 or (isinstance(ids, Tensor) and labels.shape == ids.shape)


def labels_of(batch: BatchChannels, inputs: Mapping[str, Any]) -> Any:
    """The labels in the layout of the channels.

    Args:
        batch: the channels.
        inputs: the batch that they were taken from.

    Returns:
        `labels` as they are, or shifted by one position if there is one id per token.
    """
    labels = inputs.get("labels")
    if not batch.per_token:
        return labels
    shifted = inputs.get("shift_labels")
    return shifted_labels(labels) if shifted is None and isinstance(labels, Tensor) else shifted
