"""Cross entropy from the hidden states: token losses without all logits in memory.

    loss, tokens = linear_cross_entropy(hidden, head.weight, target, reduction="sum")

Fused losses save the memory of the logits [T, V]. Each backend returns the loss to train on, and
the losses of its tokens:

- "logits": computes all logits, as a model's own head does, and gives the same loss bit for bit.
- "chunked": ours, in plain PyTorch. It computes the logits and the gradient of one chunk of tokens
  at a time, so nothing is computed twice. Correctness costs nothing more.
- "torch": `torch.nn.functional.linear_cross_entropy` (torch >= 2.13). It computes the logits again
  in the backward pass. Correctness costs one more projection.
- "liger": liger-kernel >= 0.8.2; older versions have wrong gradients for `reduction="none"`. It
  computes the logits again in the backward pass. Correctness costs nothing more.
- "cce": cut-cross-entropy. Correctness costs one more projection.
- "megatron", "te": the fused losses of Megatron and transformer-engine, for a vocabulary that is
  split over tensor-parallel ranks. Each rank holds its part of the logits.

"liger", "cce" and "te" are Triton kernels for GPUs. The docs say which of them were run, and how.

Letters: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.errors import ConfigError
from channel_metrics.losses.chunked import chunked_cross_entropy
from channel_metrics.losses.cross_entropy import HeadInputs, TokenLosses, cross_entropy
from channel_metrics.losses.kernels import cce_token_losses, liger_token_losses, torch_token_losses
from channel_metrics.losses.vocab_parallel import megatron_token_losses, te_token_losses

__all__ = ["Backend", "linear_cross_entropy"]

Backend = Literal["logits", "chunked", "torch", "liger", "cce", "megatron", "te"]
_WHOLE: dict[str, Callable[[HeadInputs], tuple[Tensor, Tensor | None]]] = {
    "torch": torch_token_losses,
    "liger": liger_token_losses,
    "cce": cce_token_losses,
}
_SPLIT: dict[
    str, Callable[[HeadInputs, dist.ProcessGroup | None], tuple[Tensor, Tensor | None]]
] = {"megatron": megatron_token_losses, "te": te_token_losses}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    reduction: str,
    backend: Backend = "chunked",
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    with_correct: bool = True,
    chunk_size: int = 1024,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, TokenLosses]:
    """The cross entropy of `hidden [T, H] @ weight [V, H].T (+ bias [V])` and its tokens.

    Args:
        hidden, weight, target, bias: tensors [T, H], [V, H], int64 [T] and [V].
        reduction: "sum" or "mean" over the tokens that are not ignored.
        backend: see above.
        ignore_index: targets of this value have no loss.
        with_correct: whether correctness is computed.
        chunk_size: the number of tokens whose logits exist at a time, if the backend can choose.
        group: for "megatron" and "te", the ranks that `weight` and `bias` are split over.

    Returns:
        The loss, which can be differentiated, and the token losses, which cannot.

    Raises:
        ConfigError: for arguments that do not fit.
        UnsupportedVersionError: for a backend that is not installed, or too old.
    """
    head = HeadInputs(
        hidden=hidden,
        weight=weight,
        target=target,
        bias=bias,
        ignore_index=ignore_index,
        with_correct=with_correct,
        chunk_size=chunk_size,
    )
    _check(head, reduction, backend, group)
    if backend == "logits":
        return cross_entropy(
            F.linear(hidden, weight, bias),
            target,
            reduction=reduction,
            ignore_index=ignore_index,
            with_correct=with_correct,
        )
    if backend == "chunked":
        total, nll, correct = chunked_cross_entropy(head)
    else:
        split = _SPLIT.get(backend)
        nll, correct = split(head, group) if split else _WHOLE[backend](head)
        total = nll.sum()
    loss = total / (target != ignore_index).sum() if reduction == "mean" else total
    return loss, TokenLosses(nll.detach(), correct, target, total.detach())


def _check(head: HeadInputs, reduction: str, backend: str, group: dist.ProcessGroup | None) -> None:
    if backend not in get_args(Backend):
        raise ConfigError(f"backend must be one of {get_args(Backend)}, but is {backend!r}.")
    if reduction not in ("sum", "mean"):
        raise ConfigError(f"reduction must be 'sum' or 'mean', but is {reduction!r}.")
    if head.chunk_size < 1:
        raise ConfigError(f"chunk_size must be at least 1, but is {head.chunk_size}.")
    hidden, weight, target = (list(x.shape) for x in (head.hidden, head.weight, head.target))
    fits = len(hidden) == len(weight) == 2 and hidden[1] == weight[1] and target == hidden[:1]
    if not fits:
        raise ConfigError(
            "expected hidden [T, H], weight [V, H] and target [T], but they have the shapes "
            f"{hidden}, {weight} and {target}; flatten batch and sequence first."
        )
    if group is not None and backend not in _SPLIT:
        raise ConfigError(
            f"backend {backend!r} needs the whole vocabulary on each rank, but a group was given; "
            f"use one of {tuple(_SPLIT)}."
        )
    if backend == "megatron" and group is None:
        raise ConfigError(
            "backend 'megatron' needs the tensor-parallel group; pass one, also of a single rank."
        )
