"""Loss and correctness of each token from a model's own cross entropy.

Letters: T tokens, V vocabulary.

`torch.nn.functional.cross_entropy` is `log_softmax` followed by `nll_loss`. If we call these two,
the loss and the gradients are the same, bit for bit (a test checks it). The token losses are then
one gather more. There is no second softmax, and no further tensor of size T x V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from channel_metrics.core.checks import IGNORE_INDEX

__all__ = [
    "HeadInputs",
    "TokenLosses",
    "cross_entropy",
    "entropy_of",
    "is_correct",
    "token_losses_of_logits",
]


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """The arguments of a loss that starts from hidden states; H is the hidden size.

    hidden: [T, H]. weight: [V, H] of the head. target: int64 [T]. bias: [V], or None.
    chunk_size: the number of tokens whose logits exist at a time, if the loss can choose.
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
        """bool [T] by one more projection, `chunk_size` tokens at a time; None if not wanted."""
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

    nll: in nats; 0 where the target is ignored. correct: bool, whether the target has the largest
    logit (a tie counts); None if not wanted. target: the target ids of the loss. reported_sum:
    0-d, the sum of nll in the loss. entropy: of the predicted distribution, in nats; None if not
    wanted, or where there are no logits.
    """

    nll: Tensor
    correct: Tensor | None
    target: Tensor
    reported_sum: Tensor
    entropy: Tensor | None = None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    reduction: str,
    ignore_index: int = IGNORE_INDEX,
    with_correct: bool = True,
    with_entropy: bool = False,
) -> tuple[Tensor, TokenLosses]:
    """`F.cross_entropy(logits [T, V], target [T])` and the losses of its tokens.

    The loss and its gradient are bit for bit those of `F.cross_entropy` with the same arguments.
    `reduction` is "sum" or "mean".
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
        entropy = entropy_of(log_probs) if with_entropy else None
    return loss, TokenLosses(nll, correct, target, reported, entropy)


def token_losses_of_logits(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    with_correct: bool = True,
    with_entropy: bool = False,
    chunk_size: int = 1024,
) -> TokenLosses:
    """Token losses [T] from logits [T, V] that another loss has used, with a second softmax.

    It is for losses that do not call `cross_entropy`, such as label smoothing or a user's own. The
    nll is always the plain one. Only `chunk_size` tokens are worked on at a time, so the added
    memory is chunk_size x V.
    """
    nll, correct, entropy = [], [], []
    with torch.no_grad():
        for rows, wanted in zip(
            torch.split(logits, chunk_size), torch.split(target, chunk_size), strict=True
        ):
            exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
            # Not F.cross_entropy, which Liger may have replaced.
            log_probs = F.log_softmax(exact, dim=-1)
            nll.append(F.nll_loss(log_probs, wanted, ignore_index=ignore_index, reduction="none"))
            if with_correct:
                correct.append(is_correct(rows, wanted))
            if with_entropy:
                entropy.append(entropy_of(log_probs))
        all_nll = torch.cat(nll)
        all_correct = torch.cat(correct) if with_correct else None
        all_entropy = torch.cat(entropy) if with_entropy else None
    return TokenLosses(all_nll, all_correct, target, all_nll.sum(), all_entropy)


def entropy_of(log_probs: Tensor) -> Tensor:
    """[T]: the entropy in nats of distributions, from their logarithms [T, V].

    Some tokens are worked on at a time: on a CPU as many as its caches hold, which takes a quarter
    of the time; elsewhere as many as need 256 MB.
    """
    numbers = 2**21 if log_probs.device.type == "cpu" else 2**26
    found = []
    for rows in torch.split(log_probs, max(numbers // log_probs.shape[-1], 1)):
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        # A token that cannot come has 0 * -inf, which is NaN, and adds nothing.
        found.append(-exact.exp().mul_(exact).nansum(-1))
    return torch.cat(found)


def is_correct(logits: Tensor, target: Tensor) -> Tensor:
    """bool [T]: whether the target [T] has the largest of the logits [T, V]; a tie counts."""
    # A maximum is several times cheaper than an argmax. Only for ties the result differs.
    chosen = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen == logits.amax(-1)
