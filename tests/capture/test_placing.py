"""Which losses belong to a model, and where they stand; small tensors, without a model."""

from __future__ import annotations

import pytest
import torch

from channel_metrics import ChannelMetricsError
from channel_metrics.capture.observation import Observation
from channel_metrics.capture.placing import Place, find_place
from channel_metrics.losses.cross_entropy import TokenLosses


def test_a_loss_outside_of_the_forwards_counts_only_if_it_is_trained() -> None:
    """A teacher's has no gradient."""
    observation, nothing = Observation(with_correct=False), torch.zeros(1)
    tokens = TokenLosses(nothing, None, nothing.long(), nothing.sum())
    for trains in (False, True):
        observation.record(tokens, torch.ones((), requires_grad=trains))
    assert observation.others == [tokens]


def test_targets_that_are_all_ignored_show_no_place() -> None:
    """Of another batch, say: nothing of them fits these labels, and nothing contradicts them."""
    labels, ignored = torch.tensor([[1, 2, 3]]), torch.full((3,), -100)
    assert find_place(labels[0], labels, 0, may_shift=False) == Place(shifts=False)
    with pytest.raises(ChannelMetricsError, match="over 3 positions, 0 supervised"):
        find_place(ignored, labels, 0, may_shift=False)
