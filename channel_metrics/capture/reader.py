"""Finds the losses of the tokens of a batch, while a trainer computes the loss of the batch.

    reader = TokenLossReader()
    with reader.observe(model) as observation:
        model(**batch)
    values, reported_sum = reader.read(observation, batch["labels"], causal=True)

Where the loss passes transformers' cross entropy or Liger's, its own token losses are taken (see
`transformers`, `liger`). Where it does not (label smoothing, `compute_loss_func`, a compiled model,
a model with a loss of its own), they are measured on the logits that the model returned, with a
second softmax. A model that does not return them either is refused.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from channel_metrics.capture.logits import (
    find_shift,
    mean_nll,
    shifted_labels,
    token_losses_from_outputs,
)
from channel_metrics.capture.observation import Observation
from channel_metrics.capture.transformers import observe_loss
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.sums import TokenValues
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.losses.cross_entropy import TokenLosses

__all__ = ["TokenLossReader"]

logger = logging.getLogger("channel_metrics")


class TokenLossReader:
    """Reads the token losses of one model, batch after batch.

    Whether the model's loss shifts the labels is found out once per kind of batch, because that
    waits for the device.

    Args:
        with_correct: whether to measure which tokens are predicted, too.
        guard: what an error of ours inside the model's loss does; None raises it.

    Attributes:
        captured: whether the last batch's token losses are those of the loss itself, and not
            measured on the logits; None before the first batch.
        warned: whether a warning was logged.
    """

    def __init__(self, *, with_correct: bool = True, guard: FaultGuard | None = None) -> None:
        self.with_correct = with_correct
        self.guard = guard or FaultGuard()
        self.captured: bool | None = None
        self.warned = False
        self._causal: bool | None = None
        # {per_token: whether the loss shifts the labels}, as seen, and as far as it can be told.
        self._seen_shifts: dict[bool, bool] = {}
        self._likely_shifts: dict[bool, bool] = {}

    def observe(self, model: torch.nn.Module) -> AbstractContextManager[Observation]:
        """A block in which `model` computes the loss of one batch."""
        return observe_loss(model, with_correct=self.with_correct, guard=self.guard)

    def read(
        self,
        observation: Observation,
        labels: Tensor,
        *,
        causal: bool | None = None,
        by_rows: bool = False,
        per_token: bool = False,
    ) -> tuple[TokenValues, Tensor | None]:
        """The values of all positions of `labels`, and the sum that the loss is made of.

        Args:
            observation: of one forward of the model, over exactly these labels.
            labels: int64 [B, S], as the batch holds them.
            causal: whether the model predicts the next token, by its kind (see `is_causal`). None
                is unknown, or as it was said for an earlier batch.
            by_rows: every row is one sequence, so that a shift inside the rows changes no sum.
            per_token: the labels stand beside their own logits already.

        Returns:
            The values, each at the position of its target (with `by_rows`, at the position that
            predicts it or at its target), and the sum of token losses that the loss was reduced
            from, 0-d; None where the loss was not seen.

        Raises:
            UnsupportedVersionError: the losses of single tokens cannot be had.
            ChannelMetricsError: the loss saw other labels than these.
        """
        self._causal = self._causal if causal is None else causal
        found, shifts = self.trainer_losses(labels, per_token=per_token), not per_token
        if found is None:
            found = _captured_losses(observation, labels)
            if found is not None:
                shifts = self._seen_shift(found, labels, per_token)
        reported = None if found is None else found.reported_sum
        if found is None:
            shifts = self._likely_shift(observation, labels, per_token)
            targets = shifted_labels(labels) if shifts else labels
            found = token_losses_from_outputs(observation, targets)
        self.captured = reported is not None
        weights = self.weights(found.nll, per_token=per_token)
        values = TokenValues(
            found.nll.view(labels.shape),
            (found.target != IGNORE_INDEX).view(labels.shape),
            None if found.correct is None else found.correct.view(labels.shape),
            None if weights is None else weights.view(labels.shape),
        )
        return (values.in_target_frame() if shifts and not by_rows else values), reported

    # ---- for the readers of trainers that compute token losses themselves --------------------

    def trainer_losses(self, labels: Tensor, *, per_token: bool) -> TokenLosses | None:
        """Token losses that the trainer has computed itself, over the labels shifted by one (with
        `per_token`, as they are); None where it leaves the loss to the model."""
        return None

    def weights(self, nll: Tensor, *, per_token: bool) -> Tensor | None:
        """The weight that the trainer gives to each nll, [T]; None where it gives none."""
        return None

    # ---- where the labels stand --------------------------------------------------------------

    def _seen_shift(self, found: TokenLosses, labels: Tensor, per_token: bool) -> bool:
        if per_token not in self._seen_shifts:
            self._seen_shifts[per_token] = find_shift(found.target, labels, may_shift=not per_token)
        return self._seen_shifts[per_token]

    def _likely_shift(self, observation: Observation, labels: Tensor, per_token: bool) -> bool:
        if per_token in self._seen_shifts:
            return self._seen_shifts[per_token]
        if per_token not in self._likely_shifts:
            shifts = not per_token and self._shift_by_the_loss(observation, labels)
            if not self._likely_shifts:
                logger.info(
                    "the loss does not pass transformers' cross entropy: token losses are "
                    "measured on the logits, with a second softmax."
                )
            self._likely_shifts[per_token] = shifts
        return self._likely_shifts[per_token]

    def _shift_by_the_loss(self, observation: Observation, labels: Tensor) -> bool:
        """Whether the labels are shifted: by the model's kind, checked against its own loss."""
        causal, model_loss = self._causal, observation.loss()
        if model_loss is not None:
            reported = float(model_loss.detach())
            means = {shift: mean_nll(observation, labels, shift) for shift in (True, False)}
            off = {shift: abs(mean - reported) / abs(reported) for shift, mean in means.items()}
            near = min(off, key=off.__getitem__)
            # A loss in bfloat16 has three digits; the other way is clearly worse or unknown.
            if off[near] < 1e-2 and off[near] * 10 < off[not near]:
                return near
            if causal is not None and off[causal] >= 1e-2:
                self.warned = True
                logger.warning(
                    "the model's own loss (%.4f) is not the mean cross entropy of its logits "
                    "(%.4f): it adds or weights something. Channel losses are the plain cross "
                    "entropy, labels %s.",
                    reported,
                    means[causal],
                    "shifted" if causal else "as they are",
                )
        if causal is None:
            raise UnsupportedVersionError(
                "whether the loss of this model shifts its labels cannot be told: its class is "
                "none of transformers' language models, and its loss is not the mean cross "
                "entropy of its logits, shifted or not. Detach the metrics for this model."
            )
        return causal


def _captured_losses(observation: Observation, labels: Tensor) -> TokenLosses | None:
    candidates = observation.matching(labels.numel())
    if len(candidates) > 1:
        raise UnsupportedVersionError(
            f"the model computed {len(candidates)} cross entropies over all labels in one "
            "step; which of them is its language model loss cannot be told. Detach the "
            "metrics for this model."
        )
    return candidates[0] if candidates else None
