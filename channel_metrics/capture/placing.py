"""Matches the positions of a model's loss to the labels of the batch.

| the model | its loss is over |
|---|---|
| causal | S positions, each with the label of the next one |
| causal, transformers <= 4.50 | S - 1 positions: the last one, without a label, is cut off |
| masked or encoder-decoder | S positions, each with its own label |
| with virtual tokens before the labels (prompt tuning) | lead + S positions |
| masked, with a head on the supervised positions only (ModernBERT) | those positions |

Letters: B rows, S row length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from channel_metrics.capture.logits import shifted_labels
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.sums import TokenValues
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.losses.cross_entropy import TokenLosses

__all__ = ["Place", "beside_labels", "find_place", "spread_out"]


class Place(NamedTuple):
    """Where the labels of a batch are in the targets of a loss.

    Attributes:
        shifts: whether a position has the label of the next one.
        lead: how many positions come before the first label in each row; -1 if the last position
            of each row is cut off.
    """

    shifts: bool
    lead: int = 0


def find_place(target: Tensor, labels: Tensor, lead: int, *, may_shift: bool) -> Place:
    """Find where the labels are in the targets. This waits for the device.

    The loss may ignore some of the labels. Those are not counted, because they are not trained.

    Args:
        target: int64 [B * (lead + S)], the targets of the loss.
        labels: int64 [B, S].
        lead: as in `Place`.
        may_shift: whether the loss may shift the labels.

    Raises:
        ChannelMetricsError: the targets are not these labels.
    """
    flat = target.to(labels.device)
    wanted = {}
    if may_shift:
        wanted[True] = labels[..., 1:] if lead < 0 else shifted_labels(_with_lead(labels, lead))
    if lead >= 0:
        wanted[False] = _with_lead(labels, lead)
    wanted = {shifts: ids.reshape(-1) for shifts, ids in wanted.items()}
    for shifts, ids in wanted.items():
        if torch.equal(flat, ids):
            return Place(shifts, lead)
    kept = flat != IGNORE_INDEX
    fits = [shifts for shifts, ids in wanted.items() if torch.equal(flat[kept], ids[kept])]
    if len(fits) == 1 and bool(kept.any()):
        return Place(fits[0], lead)
    raise ChannelMetricsError(
        "the model's loss must see the labels of the batch, shifted by one or as they are, but "
        f"it saw others (shape {list(labels.shape)}, {int((labels != IGNORE_INDEX).sum())} "
        f"supervised; the loss was over {flat.numel()} positions, {int(kept.sum())} supervised); "
        "tokens cannot be matched to their channels. Detach the metrics for this model."
    )


def _with_lead(labels: Tensor, lead: int) -> Tensor:
    return torch.nn.functional.pad(labels, (lead, 0), value=IGNORE_INDEX)


def beside_labels(values: TokenValues, place: Place, *, by_rows: bool) -> TokenValues:
    """Move the values of a loss to the labels.

    Args:
        values: [B, lead + S], as the loss has them.
        place: where the labels are.
        by_rows: whether each row is one sequence. Then values need not move inside their row.

    Returns:
        [B, S] values at the positions of their targets; with `by_rows`, somewhere in their row.
    """
    if place.lead < 0:
        values = values.map(lambda value: torch.nn.functional.pad(value, (0, -place.lead)))
    if place.shifts and (place.lead > 0 or not by_rows):
        values = values.in_target_frame()
    return values.map(lambda value: value[..., place.lead :]) if place.lead > 0 else values


def spread_out(found: TokenLosses, labels: Tensor) -> TokenLosses | None:
    """Spread losses over the supervised labels only to the positions of all labels.

    Args:
        found: token losses [M], over the M supervised labels.
        labels: int64 [B, S].

    Returns:
        Token losses [B * S]; None if the targets are not the supervised labels.
    """
    flat = labels.flatten()
    supervised = flat != IGNORE_INDEX
    if found.target.numel() != int(supervised.sum()) or not torch.equal(
        found.target, flat[supervised]
    ):
        return None
    nll = found.nll.new_zeros(flat.shape).masked_scatter(supervised, found.nll)
    correct = found.correct
    if correct is not None:
        correct = torch.zeros_like(supervised).masked_scatter(supervised, correct)
    entropy = found.entropy
    if entropy is not None:
        entropy = entropy.new_zeros(flat.shape).masked_scatter(supervised, entropy)
    return replace(found, nll=nll, correct=correct, target=flat, entropy=entropy)
