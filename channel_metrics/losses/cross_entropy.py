"""Token-level loss and correctness out of a model's own cross entropy.

Letters: T tokens, V vocabulary.

`torch.nn.functional.cross_entropy` is `log_softmax` followed by `nll_loss`. Doing these two
steps where a model does one gives the same loss and gradients bit for bit (a test checks it),
and the token losses are then a gather away: there is no second softmax, and nothing of size
T x V that the step did not have already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from channel_metrics.core.checks import IGNORE_INDEX

__all__ = ["HeadInputs", "TokenLosses", "cross_entropy", "is_correct", "token_losses_of_logits"]


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """What a loss gets that starts from hidden states; H is the hidden size.

    hidden: [T, H]. weight: [V, H] of the head. target: int64 [T]. bias: [V], or None.
    chunk_size: rows of logits that exist at a time, where that can be chosen.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    ignore_index: int = IGNORE_INDEX
    with_correct: bool = True
    chunk_size: int = 1024

    @torch.no_grad()
    def correct(self) -> Tensor | None:
        """bool [T] by one more projection, `chunk_size` rows at a time; None if not asked for."""
        if not self.with_correct:
            return None
        pairs = zip(
            torch.split(self.hidden, self.chunk_size),
            torch.split(self.target, self.chunk_size),
            strict=True,
        )
        return torch.cat([is_correct(F.linear(h, self.weight, self.bias), t) for h, t in pairs])


@dataclass(frozen=True)
class TokenLosses:
    """What a cross entropy knows about its tokens; all [T], detached.

    nll: in nats, 0 where the target is ignored. correct: bool, the target has the largest logit
    (a tie counts); None where not asked for. target: the target ids as the loss saw them.
    reported_sum: 0-d, the sum of nll that the loss was reduced from.
    """

    nll: Tensor
    correct: Tensor | None
    target: Tensor
    reported_sum: Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    reduction: str,
    ignore_index: int = IGNORE_INDEX,
    with_correct: bool = True,
) -> tuple[Tensor, TokenLosses]:
    """`F.cross_entropy(logits [T, V], target [T])` and the losses of its tokens.

    reduction: "sum" or "mean". The returned loss, and its gradient, are bit for bit those of
    `F.cross_entropy` with the same arguments.
    """
    log_probs = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(log_probs, target, ignore_index=ignore_index, reduction=reduction)
    with torch.no_grad():
        nll = F.nll_loss(log_probs, target, ignore_index=ignore_index, reduction="none")
        correct = is_correct(logits, target) if with_correct else None
        # Not double(): some devices have no float64.
        reported = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
        if reduction == "mean":
            reported = reported * (target != ignore_index).sum()
    return loss, TokenLosses(nll, correct, target, reported)


def token_losses_of_logits(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    with_correct: bool = True,
    chunk_size: int = 1024,
) -> TokenLosses:
    """Token losses [T] from logits [T, V] that some other loss has used: a second softmax.

    For losses that do not pass through `cross_entropy` (label smoothing, a loss function of the
    user's). The nll is the plain one, whatever that loss was. Works on `chunk_size` rows at a
    time, so that the added memory is chunk_size x V.
    """
    nll, correct = [], []
    with torch.no_grad():
        for rows, wanted in zip(
            torch.split(logits, chunk_size), torch.split(target, chunk_size), strict=True
        ):
            exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
            # Not F.cross_entropy: Liger may have put its own in that place.
            log_probs = F.log_softmax(exact, dim=-1)
            nll.append(F.nll_loss(log_probs, wanted, ignore_index=ignore_index, reduction="none"))
            if with_correct:
                correct.append(is_correct(rows, wanted))
        all_nll = torch.cat(nll)
        all_correct = torch.cat(correct) if with_correct else None
    return TokenLosses(all_nll, all_correct, target, all_nll.sum())


def is_correct(logits: Tensor, target: Tensor) -> Tensor:
    """bool [T]: whether the target [T] has the largest of the logits [T, V]; a tie counts."""
    # A row maximum is several times cheaper than an argmax and says the same but for ties.
    chosen = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen == logits.amax(-1)
