"""Cross entropy from hidden states, one chunk of tokens at a time, with the gradient.

The gradient of a sum of token losses is `softmax - one_hot` for the logits, times one factor that
is only known in the backward pass. It is computed while the logits of a chunk exist. Only the
gradients of the hidden states [T, H] and of the weight [V, H] are kept.

Letters: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from channel_metrics.losses.cross_entropy import HeadInputs, is_correct

__all__ = ["chunked_cross_entropy"]


def chunked_cross_entropy(head: HeadInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sum, nll [T], correct [T]). Only the sum can be differentiated, and only once."""
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _ChunkedSum.apply
    total, nll, correct = apply(
        head.hidden, head.weight, head.bias, (head, torch.is_grad_enabled())
    )
    return total, nll, correct if head.with_correct else None


class _ChunkedSum(torch.autograd.Function):
    """(hidden, weight, bias, (head, with_grad)) -> (sum, nll, correct).

    The tensors that need gradients are arguments of their own, because autograd must see them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: tuple[HeadInputs, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the three results, and the gradients of the sum."""
        head, with_grad = options
        target = head.target
        exact = torch.promote_types(hidden.dtype, torch.float32)
        nll = hidden.new_empty(target.shape, dtype=exact)
        correct = torch.zeros_like(target, dtype=torch.bool)
        wanted = [with_grad and needed for needed in ctx.needs_input_grad[:3]]
        # The gradient of the weight is summed over all chunks, so at least in float32.
        dtypes = (hidden.dtype, exact, exact)
        grads = [
            torch.zeros_like(value, dtype=dtype) if value is not None and want else None
            for value, dtype, want in zip((hidden, weight, bias), dtypes, wanted, strict=True)
        ]
        for start in range(0, len(target), head.chunk_size):
            part = slice(start, start + head.chunk_size)
            _one_chunk(head, part, nll, correct, grads)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if v is None else v.dtype for v in (hidden, weight, bias)]
        ctx.mark_non_differentiable(nll, correct)
        return nll.sum(), nll, correct

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The kept gradients times the incoming gradient."""
        grads = [
            None if grad is None else (grad * grad_sum).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None)


def _one_chunk(
    head: HeadInputs, part: slice, nll: Tensor, correct: Tensor, grads: list[Tensor | None]
) -> None:
    """Fill in nll and correctness of the tokens `part`, and add their gradients.

    When this function returns, the logits of the chunk are freed.
    """
    hidden, target = head.hidden, head.target[part]
    logits = F.linear(hidden[part], head.weight, head.bias)
    counted = target != head.ignore_index
    chosen = target.where(counted, 0).unsqueeze(1)
    if head.with_correct:
        correct[part] = is_correct(logits, target)
    log_probs = F.log_softmax(logits, dim=-1, dtype=nll.dtype)
    nll[part] = -log_probs.gather(1, chosen).squeeze(1).where(counted, 0)
    if any(grad is not None for grad in grads):
        log_probs.exp_().scatter_add_(1, chosen, log_probs.new_full(chosen.shape, -1.0))
        slope = log_probs.mul_(counted.unsqueeze(1)).to(logits.dtype)
        _accumulate(grads, slope, hidden, head.weight, part)


def _accumulate(
    grads: list[Tensor | None], slope: Tensor, hidden: Tensor, weight: Tensor, part: slice
) -> None:
    """Add the gradients of one chunk, whose logits have the gradient `slope`."""
    of_hidden, of_weight, of_bias = grads
    if of_hidden is not None:
        of_hidden[part] = slope @ weight.to(slope.dtype)
    if of_weight is not None:
        # In place for float32, without a second [V, H].
        rows = hidden[part].to(slope.dtype)
        if of_weight.dtype == slope.dtype:
            of_weight.addmm_(slope.t(), rows)
        else:
            of_weight += slope.t() @ rows
    if of_bias is not None:
        of_bias += slope.sum(0, dtype=of_bias.dtype)
