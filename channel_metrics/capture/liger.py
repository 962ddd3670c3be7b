"""Token losses out of Liger's fused loss, where the logits never exist.

Liger's forwards of transformers models end in one function, `fixed_fused_linear_cross_entropy`,
which returns a sum or a mean. Asked for the losses of single tokens, the same kernel gives them
and the predicted tokens with them; the sum is then taken here. The value and the gradients are the
same up to rounding. The price is Liger's: it then makes the logits a second time, in the backward
pass, in the same chunks.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.losses.cross_entropy import HeadInputs, TokenLosses
from channel_metrics.losses.kernels import check_liger, liger_losses_and_predictions

__all__ = ["liger_cross_entropy", "replaced_liger_loss"]

_MODULE = "liger_kernel.transformers.model.loss_utils"
_NAME = "fixed_fused_linear_cross_entropy"
_PARAMETERS = (
    "hidden_states",
    "lm_head_weight",
    "target",
    "num_items_in_batch",
    "ignore_index",
    "final_logit_softcapping",
    "accum_dtype",
    "return_token_accuracy",
    "return_predicted_tokens",
    "kwargs",
)


@contextmanager
def replaced_liger_loss(replacement: Callable[..., Any]) -> Iterator[None]:
    """`replacement(original, ...)` stands for Liger's loss inside the block, if Liger is there."""
    module: Any = sys.modules.get(_MODULE)
    if module is None:
        yield
        return
    before = getattr(module, _NAME)
    setattr(module, _NAME, functools.partial(replacement, before))
    try:
        yield
    finally:
        setattr(module, _NAME, before)


def liger_cross_entropy(
    original: Callable[..., Any], with_correct: bool, *args: Any, **kwargs: Any
) -> tuple[Any, TokenLosses]:
    """What Liger's `original` returns for these arguments, and the losses of its tokens.

    Raises `UnsupportedVersionError` for a Liger that is too old or has another signature, and for
    options with which its token losses are no plain cross entropy.
    """
    _check_version()
    given = _arguments(original, *args, **kwargs)
    more: dict[str, Any] = given["kwargs"]
    scaled = bool(more.pop("use_token_scaling", False))
    bias = more.pop("bias", None)
    changed = sorted(name for name, value in more.items() if isinstance(value, Tensor) or value)
    if changed:
        raise UnsupportedVersionError(
            f"Liger's loss was called with {', '.join(changed)}: its token losses are then not the "
            "plain cross entropy; leave these out, or detach the metrics."
        )
    target: Tensor = given["target"]
    head = HeadInputs(
        hidden=given["hidden_states"],
        weight=given["lm_head_weight"],
        target=target,
        bias=bias,
        ignore_index=given["ignore_index"],
        with_correct=with_correct
        or given["return_token_accuracy"]
        or given["return_predicted_tokens"],
    )
    nll, predicted = liger_losses_and_predictions(
        head, softcap=given["final_logit_softcapping"], accum_dtype=given["accum_dtype"]
    )
    plain = nll.detach()
    correct = None if predicted is None else predicted == target
    # Dynamic fine-tuning: each loss times the probability of its target, as a constant.
    trained = nll * torch.exp(-plain) if scaled else nll
    num_counted = (target != head.ignore_index).sum()
    num_items = given["num_items_in_batch"]
    # Over no tokens at all, Liger's mean is 0.
    loss = trained.sum() / (num_counted.clamp(min=1) if num_items is None else num_items)
    tokens = TokenLosses(plain, correct, target, plain.sum())
    return _output(loss, given, predicted, correct, num_counted), tokens


def _output(
    loss: Tensor,
    given: dict[str, Any],
    predicted: Tensor | None,
    correct: Tensor | None,
    num_counted: Tensor,
) -> Any:
    """The kind of result that Liger gives for these arguments."""
    if not (given["return_token_accuracy"] or given["return_predicted_tokens"]):
        return loss
    assert correct is not None
    # Ignored positions have -1 as prediction, so they count as wrong and must not count as tokens.
    accuracy = (correct & (given["target"] != given["ignore_index"])).sum() / num_counted
    output: Any = vars(sys.modules[_MODULE])["CrossEntropyOutput"]
    return output(
        loss=loss,
        token_accuracy=accuracy if given["return_token_accuracy"] else None,
        predicted_tokens=predicted if given["return_predicted_tokens"] else None,
    )


@functools.cache
def _check_version() -> None:
    check_liger("use_liger_kernel=True with channel metrics", "switch the fused loss off")


def _arguments(original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    signature = inspect.signature(original)
    if tuple(signature.parameters) != _PARAMETERS:
        raise UnsupportedVersionError(
            f"{_NAME} of Liger has the parameters {tuple(signature.parameters)}, but {_PARAMETERS} "
            "were expected; use a tested version (see docs/fused_losses.md), or switch it off."
        )
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments) | {"kwargs": dict(bound.arguments["kwargs"])}
