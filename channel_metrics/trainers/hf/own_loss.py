"""A warning if a script computes the loss by itself, and trains on other tokens than are counted.

If `compute_loss` takes the labels out of the batch and computes the loss with a function of its
own, it cannot be seen which tokens the loss is made of. All labels of the batch are counted then.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from channel_metrics.capture.observation import Observation
from channel_metrics.core.sums import TokenValues

__all__ = ["warn_of_own_loss"]

# A loss in bfloat16 has three digits.
_TOLERANCE = 1e-2


def warn_of_own_loss(
    trainer: Any, result: Any, observation: Observation, values: TokenValues, num_items: Any
) -> None:
    """Compare the first loss that could not be captured with the tokens that are counted.

    This waits for the device, once in the life of the metrics. There is nothing to compare if the
    model itself has computed the loss, or if the trainer changes it in a way that is known: with
    label smoothing, or with weights for tokens.

    Args:
        trainer: a trainer with channel metrics.
        result: what its `compute_loss` has returned.
        observation: of this `compute_loss`.
        values: the values of the tokens that are counted.
        num_items: the number that the trainer wants the loss to be divided by; None for the mean.
    """
    scratch = trainer.channel_scratch
    known = values.weights is not None or getattr(trainer, "label_smoother", None) is not None
    if scratch.reader.captured is not False or scratch.compared or known:
        return
    scratch.compared = True
    loss = result[0] if isinstance(result, tuple) and result else result
    by_model = any(forward.has_labels for forward in observation.forwards)
    if by_model or not isinstance(loss, Tensor) or loss.numel() != 1:
        return
    total = float(values.losses[values.mask].sum(dtype=torch.float64))
    count, trained = int(values.mask.sum()), float(loss.detach())
    if not count or not math.isfinite(total + trained):
        return
    means = [total / count, total / float(num_items or count)]
    # transformers multiplies the loss of a rank by the number of ranks if it divides by all tokens.
    means += [mean * trainer.accelerator.num_processes for mean in means]
    if all(abs(trained - mean) > _TOLERANCE * mean for mean in means):
        trainer.channel_metrics.warn_once(
            f"compute_loss returned {trained:.4f}, but the mean cross entropy of the {count} "
            f"labels in its batch is {total / count:.4f}. All these labels are counted, with their "
            "plain cross entropy. If compute_loss masks some of them, pass the masked labels to "
            "the model (`model(..., labels=labels)`): then only these tokens count."
        )
