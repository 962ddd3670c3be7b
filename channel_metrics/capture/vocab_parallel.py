"""Measures correctness on vocab-parallel logits before Megatron's cross entropy overwrites them.

Letters: S sequence positions, B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from channel_metrics.core.faults import FaultGuard
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.losses.vocab_parallel import vocab_parallel_correct

__all__ = ["Correctness"]

_METHOD = "compute_language_model_loss"
# Enough for two micro-batches, each with its own loss and one per depth of multi-token prediction.
_MAX_PENDING = 32


class Correctness:
    """Watches models compute their losses, and says which tokens they predicted.

    The model computes token losses, and the loss function gets them later. Multi-token prediction
    computes further losses in between. So the tensor of losses itself is the key to its result.

    Args:
        guard: decides what an error of ours inside the model's loss does.

    Attributes:
        is_watching: whether a watched loss is being computed.
    """

    def __init__(self, guard: FaultGuard) -> None:
        self.guard = guard
        # A replacement may call the function that it replaced: only the outer one is measured.
        self.is_watching = False
        self._pending: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
        self._not_found_in = ""

    def watch(self, model: Any) -> None:
        """Watch the loss of the language model inside `model`, if it holds one.

        Call it before each forward. If other code has replaced the model's loss meanwhile, the
        replacement is watched; it still computes the loss.

        Args:
            model: a Megatron model, wrapped or not.
        """
        language_model = _language_model(model)
        if language_model is None:
            # A pipeline stage may have no language model.
            self._not_found_in = type(model).__name__
            return
        found = vars(language_model).get(_METHOD)
        if isinstance(found, _WatchedLoss):
            if found.watcher is self:
                return
            found = found.own
        setattr(language_model, _METHOD, _WatchedLoss(self, language_model, found))

    def of(self, losses: Tensor) -> Tensor:
        """bool [B, S]: which tokens were predicted. It may be called once for a tensor.

        Args:
            losses: [B, S], the tensor that the watched model returned.

        Raises:
            ChannelMetricsError: no watched model returned this tensor.
        """
        found = self._pending.pop(_identity(losses), None)
        if found is None:
            raise ChannelMetricsError(
                "token accuracy needs the losses that compute_language_model_loss returned, but "
                f"the loss function got another tensor (shape {list(losses.shape)})"
                f"{self._where()}; leave token_acc out of the metrics for this model."
            )
        return found[1]

    def forget(self) -> None:
        """Drop results that were not asked for, such as those of multi-token prediction."""
        self._pending.clear()

    def remember(self, losses: Tensor, correct: Tensor) -> None:
        """Keep `correct` [B, S] until `of` is called with `losses` [B, S]."""
        # Keep the tensor too, so that no other tensor gets its address.
        self._pending[_identity(losses)] = (losses.detach(), correct)
        while len(self._pending) > _MAX_PENDING:
            del self._pending[next(iter(self._pending))]

    def _where(self) -> str:
        if not self._not_found_in:
            return ""
        return (
            f"; {self._not_found_in} has no such method, nor has what it holds as .module or "
            ".language_model"
        )


class _WatchedLoss:
    """Replaces the method of a language model that computes its loss.

    Args:
        watcher: gets the correctness of the tokens.
        language_model: the model.
        own: the replaced attribute of the instance; None for the method of its class.
    """

    def __init__(
        self, watcher: Correctness, language_model: Any, own: Callable[..., Tensor] | None
    ) -> None:
        self.watcher, self.own = watcher, own
        self._language_model = language_model

    def __call__(self, labels: Tensor, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Read the method at each call, because other code may have replaced it.
        original = self.own or getattr(type(self._language_model), _METHOD).__get__(
            self._language_model
        )
        watcher = self.watcher
        # Not `measuring`: the tensor-parallel ranks measure together until all know of an error.
        if watcher.guard.off or watcher.is_watching:
            return cast(Tensor, original(labels, logits, *args, **kwargs))
        correct = None
        with watcher.guard.guarded():
            group = _tensor_parallel_group(self._language_model)
            correct = vocab_parallel_correct(logits, labels, group)
        watcher.is_watching = True
        try:
            losses = cast(Tensor, original(labels, logits, *args, **kwargs))
        finally:
            watcher.is_watching = False
        if correct is not None:
            watcher.remember(losses, correct)
        return losses


def _identity(losses: Tensor) -> tuple[int, torch.Size]:
    return losses.data_ptr(), losses.shape


def _language_model(model: Any) -> Any:
    """The model that has the method: `model`, the model that it wraps (Float16Module,
    DistributedDataParallel), or the language model of a multimodal one (LLaVAModel)."""
    while model is not None and not hasattr(type(model), _METHOD):
        wrapped = getattr(model, "module", None)
        model = getattr(model, "language_model", None) if wrapped is None else wrapped
    return model


def _tensor_parallel_group(model: Any) -> dist.ProcessGroup | None:
    from megatron.core import parallel_state

    if not dist.is_initialized():
        return None
    collection = getattr(model, "pg_collection", None)
    group: dist.ProcessGroup | None = getattr(collection, "tp", None)
    return group or parallel_state.get_tensor_model_parallel_group()
