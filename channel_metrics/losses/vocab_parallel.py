"""Cross entropy from a head whose vocabulary is split over the tensor-parallel ranks.

The kernels are those of Megatron and transformer-engine. They may overwrite the logits, so
correctness is computed first.

Letters: S sequence positions, B rows, T tokens, H hidden size, V the vocabulary of one rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.losses.cross_entropy import HeadInputs

__all__ = ["megatron_token_losses", "te_token_losses", "vocab_parallel_correct"]


def megatron_token_losses(
    head: HeadInputs, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Losses [T] of Megatron's fused kernel, which can be differentiated, and correctness [T].

    The weight and bias of `head` are this rank's part. Megatron always rounds the gradient of the
    logits to bfloat16.
    """
    try:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    except ImportError:
        raise UnsupportedVersionError(
            "backend 'megatron' needs the package megatron-core; install it, or use 'chunked'."
        ) from None
    logits, correct = _logits_and_correct(head, group)
    target = head.target.unsqueeze(1)
    nll: Tensor = fused_vocab_parallel_cross_entropy(logits, target, group)
    return _without_ignored(nll.squeeze(1), head), correct


def te_token_losses(
    head: HeadInputs, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """The same with transformer-engine's kernel. We ran it in Triton's interpreter only."""
    try:
        module = importlib.import_module("transformer_engine.pytorch.cross_entropy")
    except ImportError:
        raise UnsupportedVersionError(
            "backend 'te' needs the package transformer-engine[pytorch] >= 1.13; install it, or "
            "use 'chunked'."
        ) from None
    logits, correct = _logits_and_correct(head, group)
    target = head.target.masked_fill(head.target == head.ignore_index, -100).unsqueeze(1)
    # Parameters of all releases since 1.13: logits [S, B, V], target [S, B], label_smoothing,
    # reduce_loss, dist_process_group. Later ones also have ignore_idx, which is -100 by default.
    nll: Tensor = module.parallel_cross_entropy(logits, target, 0.0, False, group)
    return _without_ignored(nll.squeeze(1), head), correct


def vocab_parallel_correct(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """bool [B, S]: whether the target has the largest logit; a tie counts.

    It costs one all-reduce of two values per token.

    Args:
        logits: [S, B, V], for this rank's part of the vocabulary. Parts are in rank order.
        labels: [B, S], ids in the whole vocabulary. Other ids (-100) are never correct.
        group: the tensor-parallel group. All its ranks must call this.
    """
    with torch.no_grad():
        size = logits.shape[-1]
        parallel = group is not None and dist.get_world_size(group) > 1
        first = dist.get_rank(group) * size if parallel else 0
        target = labels.transpose(0, 1) - first
        held = (target >= 0) & (target < size)
        at = target.clamp(0, size - 1).unsqueeze(-1)
        lowest = torch.finfo(logits.dtype).min
        of_target = logits.detach().gather(-1, at).squeeze(-1)
        # Every backend can reduce float32, which holds half precision exactly.
        both = torch.stack([logits.detach().amax(-1), of_target.masked_fill(~held, lowest)]).float()
        known = held
        if parallel:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
            known = (labels.transpose(0, 1) >= 0) & (
                target + first < size * dist.get_world_size(group)
            )
        return ((both[1] >= both[0]) & known).transpose(0, 1)


class _CopyToGroup(torch.autograd.Function):
    """Copies the hidden states, and sums their gradients over the ranks in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _logits_and_correct(
    head: HeadInputs, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Logits [T, 1, V] of this rank, in Megatron's order of dimensions, and correctness [T]."""
    parallel = group is not None and dist.get_world_size(group) > 1
    copy: Callable[..., Tensor] = _CopyToGroup.apply
    hidden = copy(head.hidden, group) if parallel else head.hidden
    logits = F.linear(hidden, head.weight, head.bias).unsqueeze(1)
    if not head.with_correct:
        return logits, None
    return logits, vocab_parallel_correct(logits, head.target.unsqueeze(0), group).squeeze(0)


def _without_ignored(nll: Tensor, head: HeadInputs) -> Tensor:
    # For ignored targets, the kernels return arbitrary numbers.
    return nll.where(head.target != head.ignore_index, 0)
