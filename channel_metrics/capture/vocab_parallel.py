"""Token correctness from vocab-parallel logits, before Megatron's cross entropy overwrites them.

Letters: S sequence positions, B rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from channel_metrics.core.faults import FaultGuard
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.losses.vocab_parallel import vocab_parallel_correct

__all__ = ["Correctness"]

_METHOD = "compute_language_model_loss"
_MARK = "_channel_metrics_watched"
# One for the model's own loss and one per depth of multi-token prediction, of two micro-batches.
_MAX_PENDING = 32


class Correctness:
    """Watches models compute their losses, and tells which tokens were right.

    A model computes the loss in one place and the loss function gets it in another, possibly
    much later; and multi-token prediction computes further losses the same way. So the two are
    matched by the tensor of losses itself.
    """

    def __init__(self, guard: FaultGuard) -> None:
        self._guard = guard
        self._pending: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}

    def watch(self, model: Any) -> None:
        """Measure from now on in the language model inside `model`, if it holds one."""
        language_model = _language_model(model)
        if language_model is None or getattr(language_model, _MARK, None) is self:
            return
        original: Callable[..., Tensor] = getattr(type(language_model), _METHOD).__get__(
            language_model
        )

        @functools.wraps(original)
        def compute_language_model_loss(labels: Tensor, logits: Tensor, **kwargs: Any) -> Tensor:
            correct = None
            # Not `measuring`: the tensor-parallel ranks go on together until all know of an error.
            if not self._guard.off:
                with self._guard.guarded():
                    group = _tensor_parallel_group(language_model)
                    correct = vocab_parallel_correct(logits, labels, group)
            losses = original(labels, logits, **kwargs)
            if correct is not None:
                self._remember(losses, correct)
            return losses

        setattr(language_model, _METHOD, compute_language_model_loss)
        setattr(language_model, _MARK, self)

    def of(self, losses: Tensor) -> Tensor:
        """bool [B, S] for the `losses` that a watched model returned; may be asked for once."""
        found = self._pending.pop(_identity(losses), None)
        if found is None:
            raise ChannelMetricsError(
                "token accuracy needs the losses that compute_language_model_loss returned, but "
                f"the loss function got another tensor (shape {list(losses.shape)}); leave "
                "token_acc out of the metrics for this model."
            )
        return found[1]

    def forget(self) -> None:
        """Drop what nobody asked for: the losses of multi-token prediction."""
        self._pending.clear()

    def _remember(self, losses: Tensor, correct: Tensor) -> None:
        # The tensor is kept: while it lives, nothing else has its address.
        self._pending[_identity(losses)] = (losses.detach(), correct)
        while len(self._pending) > _MAX_PENDING:
            del self._pending[next(iter(self._pending))]


def _identity(losses: Tensor) -> tuple[int, torch.Size]:
    return losses.data_ptr(), losses.shape


def _language_model(model: Any) -> Any:
    """What is wrapped in `model` (Float16Module, DistributedDataParallel), if it has a loss."""
    while not hasattr(type(model), _METHOD):
        model = getattr(model, "module", None)
        if model is None:
            return None
    return model


def _tensor_parallel_group(model: Any) -> dist.ProcessGroup | None:
    from megatron.core import parallel_state

    if not dist.is_initialized():
        return None
    collection = getattr(model, "pg_collection", None)
    group: dist.ProcessGroup | None = getattr(collection, "tp", None)
    return group or parallel_state.get_tensor_model_parallel_group()
