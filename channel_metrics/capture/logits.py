"""Measures token losses on the logits that a model returned.

Letters: B rows, S row length, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from channel_metrics.capture.observation import Forward
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.losses.cross_entropy import TokenLosses, token_losses_of_logits

__all__ = ["mean_nll", "shifted_labels", "token_losses_from_outputs"]


def shifted_labels(labels: Tensor) -> Tensor:
    """Labels [..., S] as a causal loss sees them: position t holds the label of t + 1."""
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]


def token_losses_from_outputs(
    forward: Forward, targets: Tensor, with_correct: bool, *, with_entropy: bool = False
) -> TokenLosses:
    """Token losses [B * S], measured on the logits [B, S, V] that the model returned.

    Args:
        forward: the forward that returned them.
        targets: int64 [B, S], the label that each position predicts.
        with_correct: whether to measure which tokens are predicted.
        with_entropy: whether to measure the entropy of what is predicted.

    Raises:
        UnsupportedVersionError: the model returned no logits, or not for all labels.
    """
    logits = forward.logits()
    if logits is None and forward.losses:
        raise UnsupportedVersionError(
            f"expected a loss over all labels {list(targets.shape)}, but the model computed it "
            f"over {forward.losses[-1].target.numel()} positions: it leaves some out, or adds "
            "some. If the batch or the script passes logits_to_keep, leave it out; else detach "
            "the metrics for this model."
        )
    if logits is None:
        raise UnsupportedVersionError(
            "the loss of this model cannot be seen per token: it did not pass transformers' "
            "cross entropy nor Liger's, and the model returned no logits (a fused loss does that, "
            "or a compiled one of Liger's); switch the fused loss off, or detach the metrics."
        )
    if logits.shape[:-1] != targets.shape:
        raise UnsupportedVersionError(
            f"expected logits for all labels {list(targets.shape)}, but the model returned "
            f"{list(logits.shape)}. If the batch or the script passes logits_to_keep, leave it "
            "out; else detach the metrics for this model."
        )
    return token_losses_of_logits(
        logits.detach().flatten(0, -2),
        targets.reshape(-1).to(logits.device),
        with_correct=with_correct,
        with_entropy=with_entropy,
    )


def mean_nll(forward: Forward, labels: Tensor, shift: bool) -> float:
    """The mean nll in nats of the logits that the model returned.

    Args:
        forward: the forward that returned them.
        labels: int64 [B, S].
        shift: whether to shift the labels by one.
    """
    targets = shifted_labels(labels) if shift else labels
    total = token_losses_from_outputs(forward, targets, False).reported_sum
    return float(total / (targets != IGNORE_INDEX).sum().clamp(min=1))
