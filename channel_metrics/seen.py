"""`Seen`: what a block of `ChannelMetrics.observe` is given, to hand over logits or token losses.

Letters: B rows, S row length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from channel_metrics.capture.logits import shifted_labels
from channel_metrics.capture.placing import Place, beside_labels
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.sums import TokenValues
from channel_metrics.counting import Counting
from channel_metrics.errors import ChannelError, ChannelMetricsError
from channel_metrics.losses.cross_entropy import token_losses_of_logits

__all__ = ["Seen"]


class Seen:
    """What `observe` gives its block: takes the logits or token losses of a loop's own loss.

    Call one of the two methods, once. What is handed over is read at once and not kept.

    Attributes:
        labels: those of the batch.
        values: the values of the tokens that were handed over; None if none were.
        observation: what was seen of the model, an `Observation`; None if it is not observed.
        discarded: whether `discard` was called.
    """

    def __init__(self, metrics: Counting, labels: Any) -> None:
        self._metrics, self.labels = metrics, labels
        self.values: TokenValues | None = None
        self.observation: Any = None
        self.discarded = False

    def discard(self) -> None:
        """Do not count this batch: nothing is trained on it."""
        self.discarded = True

    def logits(self, logits: Tensor, *, labels: Tensor | None = None, causal: bool = True) -> None:
        """Measure the token losses on logits, with a softmax of our own.

        Args:
            logits: [B, S, V], or [B, S - 1, V] without the last position; rows may be flattened.
            labels: int64 [B, S], -100 where not supervised; by default those of the batch.
            causal: whether the logits at position t predict the label at t + 1. If False, they
                predict the label at t, and `logits` must have all S positions.
        """
        with self._metrics.guard.guarded():
            if not self._metrics.measuring:
                return
            targets, place = self._targets(logits.shape[:-1], labels, causal)
            found = token_losses_of_logits(
                logits.detach().reshape(-1, logits.shape[-1]),
                targets.reshape(-1).to(logits.device),
                with_correct=self._metrics.with_correct,
                with_entropy=self._metrics.with_entropy,
            )
            more = {"correct": found.correct, "entropy": found.entropy}
            self._keep(targets, place, found.nll, **more)

    def token_losses(
        self,
        losses: Tensor,
        *,
        correct: Tensor | None = None,
        labels: Tensor | None = None,
        causal: bool = True,
    ) -> None:
        """Take token losses that the loop has computed itself.

        Args:
            losses: [B, S] in nats, or [B, S - 1] without the last position; may be flattened.
            correct: bool of the same shape, whether the target was predicted; for `token_acc`.
            labels, causal: as for `logits`.
        """
        with self._metrics.guard.guarded():
            if not self._metrics.measuring:
                return
            targets, place = self._targets(losses.shape, labels, causal)
            if correct is not None and correct.shape != losses.shape:
                raise ChannelMetricsError(
                    f"`correct` must have the shape of the losses, {list(losses.shape)}, but has "
                    f"{list(correct.shape)}."
                )
            self._keep(targets, place, losses.detach(), correct=correct)

    def _targets(
        self, shape: torch.Size, labels: Tensor | None, causal: bool
    ) -> tuple[Tensor, Place]:
        """The target [B, S] or [B, S - 1] of each position, and where the labels are."""
        labels = self.labels if labels is None else labels
        if not isinstance(labels, Tensor):
            raise ChannelError(
                "logits and token losses need `labels`: keep them in the batch, or pass `labels=`."
            )
        width = labels.shape[-1]
        rows = labels.numel() // max(width, 1)
        for lead in (0, -1) if causal else (0,):
            # Flat, or rows of this length: not the layout [S, B].
            if shape.numel() == rows * (width + lead) and shape[-1] in (width + lead, *shape[:1]):
                targets = shifted_labels(labels) if causal else labels
                return targets[..., : width + lead], Place(causal, lead)
        wanted = f"{[rows, width]} or {[rows, width - 1]}" if causal else f"{[rows, width]}"
        raise ChannelMetricsError(
            f"logits or token losses over labels {list(labels.shape)} must have {wanted} "
            f"positions{'' if causal else ' with causal=False'}, but have {list(shape)}; pass the "
            "`labels` that they belong to, and causal=False if these are already shifted."
        )

    def _keep(self, targets: Tensor, place: Place, nll: Tensor, **more: Any) -> None:
        if self.values is not None:
            raise ChannelMetricsError(
                "logits or token losses were handed over twice in one block; open one block of "
                "`observe` per forward."
            )
        mask = (targets != IGNORE_INDEX).to(nll.device)
        kept = targets.to(nll.device) if self._metrics.with_targets else None
        values = TokenValues(nll, mask, targets=kept, **more)
        values = values.map(lambda v: v.reshape(targets.shape))
        self.values = beside_labels(values, place, by_rows=False)

    def returned(self, output: Any) -> None:
        """Take what a step returned, if it is a mapping with `token_losses` or `logits`.

        With `token_losses`, it may hold `correct`, and `labels` that are already shifted. `logits`
        are read as if the model had returned them: its loss tells whether they are shifted.
        """
        if not isinstance(output, Mapping):
            return
        if "token_losses" in output:
            given = {name: output.get(name) for name in ("correct", "labels")}
            self.token_losses(output["token_losses"], **given, causal=given["labels"] is None)
        elif "logits" in output and self.observation and not self.observation.losses:
            from channel_metrics.capture.observation import Forward

            self.observation.forwards = [Forward(outputs=output)]
