"""Token losses out of TRL's chunked loss: `loss_type="chunked_nll"` of trl 1.4 to 1.14.

It computes the logits of a chunk of tokens at a time, and returns sums over the batch. We read the
arguments of its `nll_loss` and the result of its `argmax` for each chunk, so nothing is computed
twice. The backward pass computes the chunks again, and is not read.

Letters: T positions of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from channel_metrics.capture.logits import shifted_labels
from channel_metrics.capture.observation import LossHook, Observation
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.losses.cross_entropy import TokenLosses

__all__ = ["CHUNKED_LOSS"]


class _Chunks(TorchFunctionMode):
    """Keeps the token losses, and the predictions, of each chunk that is computed inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.nll: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.nll_loss:
            log_probs, target = args[:2]
            with torch.no_grad():
                self.nll.append(torch.nn.functional.nll_loss(log_probs, target, reduction="none"))
        elif func is Tensor.argmax:
            self.predicted.append(result)
        return result


def _observing(
    observation: Observation, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    def seen(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Chunks() as chunks:
            result = compute(*args, **kwargs)
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        loss, num_tokens = result[0], result[3]
        num_items = given.get("num_items_in_batch")
        total = loss.detach() * (num_tokens if num_items is None else num_items)
        tokens = _token_losses(chunks, _targets(given), total, observation.with_correct)
        observation.record(tokens, loss)
        return result

    return observation.guard.shielded(original, seen, *args, **kwargs)


CHUNKED_LOSS = LossHook("trl.trainer.sft_trainer", "_chunked_cross_entropy_loss", _observing)


def _targets(given: dict[str, Any]) -> Tensor:
    """The target of each position, [T]."""
    shifted: Tensor | None = given.get("shift_labels")
    return (shifted_labels(given["labels"]) if shifted is None else shifted).flatten()


def _token_losses(
    chunks: _Chunks, target: Tensor, total: Tensor, with_correct: bool
) -> TokenLosses:
    # The chunks hold the supervised tokens in their order, and padding after these.
    counted = target != IGNORE_INDEX

    def placed(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        whole = torch.zeros_like(target, dtype=dtype)
        source = torch.cat([*parts, target.new_zeros(target.numel())]).to(dtype)
        return whole.masked_scatter(counted, source)

    nll = placed(chunks.nll, torch.float32)
    correct = placed(chunks.predicted, target.dtype) == target if with_correct else None
    return TokenLosses(nll, correct, target, total)
