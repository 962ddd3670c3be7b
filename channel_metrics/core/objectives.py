"""Objectives: one number from the losses of all channels, to choose a checkpoint by.

They are means or maxima over channels, where the trainer's own loss is a mean over tokens, which a
large channel dominates. `unlabeled` is no channel. This module does not import torch.

>>> objective("macro_loss").formula({"a": 1.0, "b": 3.0}, {})
2.0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["OBJECTIVES", "WEIGHTED", "Objective", "objective", "worst_channel"]

WEIGHTED = "weighted_loss_of_channels"


@dataclass(frozen=True)
class Objective:
    """One value per window, logged under its own name after the prefix: `eval_macro_loss`.

    formula: takes {channel: loss} of the window, which is not empty, and the config's
        `channel_weights`. It returns None if there is no value.
    """

    name: str
    formula: Callable[[Mapping[str, float], Mapping[str, float]], float | None]
    doc: str


def _macro(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _worst(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return max(losses.values())


def _weighted(losses: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    if not weights.keys() <= losses.keys():
        return None  # with other channels, it would be another objective
    return sum(w * losses[name] for name, w in weights.items()) / sum(weights.values())


OBJECTIVES = (
    Objective("macro_loss", _macro, "the mean of the channels' `loss`; each channel counts alike"),
    Objective("worst_loss", _worst, "the highest `loss` of a channel"),
    Objective(
        WEIGHTED,
        _weighted,
        "the mean of the channels' `loss` with the weights of `channel_weights`; absent from a "
        "window in which a channel with a weight has no loss",
    ),
)


def objective(name: str) -> Objective:
    """The objective with this name."""
    return next(one for one in OBJECTIVES if one.name == name)


def worst_channel(losses: Mapping[str, float]) -> str:
    """The channel with the highest loss; the first of several; empty without losses."""
    return max(losses, key=losses.__getitem__, default="")
