"""Reads the token losses of a batch while a trainer computes the loss of the batch.

    reader = TokenLossReader()
    with reader.observe(model) as observation:
        model(**batch)
    values, reported_sum = reader.read(observation, batch["labels"], causal=True)

If the loss uses transformers' cross entropy or Liger's, its own token losses are taken (see
`transformers`, `liger`). If it does not (label smoothing, `compute_loss_func`, a compiled model, a
model with its own loss), they are measured on the logits that the model returned, with a second
softmax. If the model returns no logits either, an error is raised.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from channel_metrics.capture.logits import (
    mean_nll,
    shifted_labels,
    token_losses_from_outputs,
)
from channel_metrics.capture.observation import Forward, Observation
from channel_metrics.capture.placing import Place, beside_labels, find_place, spread_out
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

    It finds out once per kind of batch whether the model's loss shifts the labels, because that
    waits for the device.

    Args:
        with_correct: whether to measure which tokens are predicted.
        guard: decides what an error of ours inside the model's loss does; None raises it.

    Attributes:
        captured: True if the token losses of the last batch are those of the loss itself, False
            if they were measured on the logits, None before the first batch.
        warned: whether a warning was logged.
        with_entropy: whether to measure the entropy of what is predicted, if there are logits.
    """

    def __init__(self, *, with_correct: bool = True, guard: FaultGuard | None = None) -> None:
        self.with_correct = with_correct
        self.guard = guard or FaultGuard()
        self.captured: bool | None = None
        self.warned = self.with_entropy = False
        self._causal: bool | None = None
        # {(per_token, lead): the place that was seen} and {per_token: whether it likely shifts}
        self._places: dict[tuple[bool, int], Place] = {}
        self._likely_shifts: dict[bool, bool] = {}

    def observe(self, model: torch.nn.Module) -> AbstractContextManager[Observation]:
        """A block in which `model` computes the loss of one batch."""
        return observe_loss(
            model,
            with_correct=self.with_correct,
            with_entropy=self.with_entropy,
            guard=self.guard,
        )

    def read(
        self,
        observation: Observation,
        labels: Tensor,
        *,
        causal: bool | None = None,
        by_rows: bool = False,
        per_token: bool = False,
        with_targets: bool = False,
    ) -> tuple[TokenValues, Tensor | None]:
        """Read the values of all tokens of one batch.

        Args:
            observation: of one `compute_loss` over these labels.
            labels: int64 [B, S], as the batch holds them.
            causal: whether a model of this kind predicts the next token, see `is_causal`. None
                means as for the batch before, or unknown.
            by_rows: whether every row is one sequence. A shift inside a row then changes no sum.
            per_token: whether each label is already at the position of its logits.
            with_targets: whether the values hold the targets.

        Returns:
            The values [B, S], each at the position of its target (with `by_rows`, possibly at the
            position that predicts it); and the sum of token losses that the loss was made from, a
            tensor of one number, or None if the loss was not seen.

        Raises:
            UnsupportedVersionError: token losses cannot be found for this model.
            ChannelMetricsError: the loss was computed over other labels.
        """
        self._causal = self._causal if causal is None else causal
        found, shifts, lead = self.trainer_losses(labels, per_token=per_token), not per_token, 0
        forward = observation.chosen() if found is None else None
        if forward is not None:
            found = self._captured_losses(forward, labels, per_token)
            if found is not None:
                shifts, lead = self._place(found, labels, per_token)
        reported = None if found is None else found.reported_sum
        if found is None:
            assert forward is not None
            shifts = self._likely_shift(forward, labels, per_token)
            targets = shifted_labels(labels) if shifts else labels
            found = token_losses_from_outputs(
                forward, targets, self.with_correct, with_entropy=self.with_entropy
            )
        self.captured = reported is not None
        values = TokenValues(
            found.nll,
            found.target != IGNORE_INDEX,
            found.correct,
            self.weights(found.nll, per_token=per_token),
            found.target if with_targets else None,
            entropy=found.entropy,
        )
        shape = (*labels.shape[:-1], labels.shape[-1] + lead)
        values, place = values.map(lambda value: value.view(shape)), Place(shifts, lead)
        return beside_labels(values, place, by_rows=by_rows), reported

    # ---- for subclasses, if a trainer computes token losses itself ---------------------------

    def trainer_losses(self, labels: Tensor, *, per_token: bool) -> TokenLosses | None:
        """Token losses that the trainer has computed itself; None if the model computes the loss.

        Args:
            labels: int64 [B, S].
            per_token: whether the losses are over the labels as they are, not shifted by one.
        """
        return None

    def weights(self, nll: Tensor, *, per_token: bool) -> Tensor | None:
        """The weight [T] that the trainer gives to each nll [T]; None if it weights no tokens."""
        return None

    # ---- where the labels are ----------------------------------------------------------------

    def _captured_losses(
        self, forward: Forward, labels: Tensor, per_token: bool
    ) -> TokenLosses | None:
        """The cross entropy over the labels; None if none was seen."""
        rows = labels.numel() // max(labels.shape[-1], 1)
        sizes = [found.target.numel() for found in forward.losses]
        # First look for a loss over exactly the labels. A model may add positions before them.
        fits = [n == labels.numel() for n in sizes]
        if not any(fits) and not per_token and self._causal is False:
            few = [spread_out(found, labels) for found in forward.losses]
            if len(few) == 1 and few[0] is not None:
                return few[0]
        if not any(fits) and not per_token:
            fits = [n % max(rows, 1) == 0 and n >= labels.numel() - rows for n in sizes]
        candidates = [found for found, fit in zip(forward.losses, fits, strict=True) if fit]
        if len(candidates) > 1:
            raise UnsupportedVersionError(
                f"the model computed {len(candidates)} cross entropies over all labels in one "
                "step; which of them is its language model loss cannot be told. Detach the "
                "metrics for this model."
            )
        return candidates[0] if candidates else None

    def _place(self, found: TokenLosses, labels: Tensor, per_token: bool) -> Place:
        rows = labels.numel() // max(labels.shape[-1], 1)
        lead = (found.target.numel() - labels.numel()) // max(rows, 1)
        if (per_token, lead) not in self._places:
            place = find_place(found.target, labels, lead, may_shift=not per_token)
            self._places[per_token, lead] = place
        return self._places[per_token, lead]

    def _likely_shift(self, forward: Forward, labels: Tensor, per_token: bool) -> bool:
        if (per_token, 0) in self._places:
            return self._places[per_token, 0].shifts
        if per_token not in self._likely_shifts:
            shifts = not per_token and self._shift_by_the_loss(forward, labels)
            if not self._likely_shifts:
                logger.info(
                    "the loss does not pass transformers' cross entropy: token losses are "
                    "measured on the logits, with a second softmax."
                )
            self._likely_shifts[per_token] = shifts
        return self._likely_shifts[per_token]

    def _shift_by_the_loss(self, forward: Forward, labels: Tensor) -> bool:
        """Whether the labels are shifted, by the model's own loss or else by its kind."""
        causal, model_loss = self._causal, forward.loss()
        if model_loss is not None:
            reported = float(model_loss.detach())
            means = {shift: mean_nll(forward, labels, shift) for shift in (True, False)}
            off = {shift: abs(mean - reported) / abs(reported) for shift, mean in means.items()}
            near = min(off, key=off.__getitem__)
            # A loss in bfloat16 has three digits. The other shift must be clearly further off.
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
