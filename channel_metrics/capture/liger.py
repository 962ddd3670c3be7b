"""Takes token losses out of Liger's fused loss, which never holds all logits.

Liger's forwards of transformers models end in one function, `fixed_fused_linear_cross_entropy`,
which returns a sum or a mean. We ask the same kernel for the losses and predictions of single
tokens, and add the losses up here. The value and the gradients are the same up to rounding. In
return, Liger computes the logits a second time in the backward pass, in the same chunks.

If another library has replaced that function, its function is called unchanged. Then the same
kernel measures the token losses in addition, which costs one more projection.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from channel_metrics.capture.observation import LossHook, Observation, is_defined_in
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.losses.cross_entropy import HeadInputs, TokenLosses
from channel_metrics.losses.kernels import check_liger, liger_losses_and_predictions

__all__ = ["LIGER_LOSS", "liger_cross_entropy"]

_MODULE = "liger_kernel.transformers.model.loss_utils"
_NAME = "fixed_fused_linear_cross_entropy"


def _expected(  # noqa: PLR0917 - the signature of Liger's function
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    final_logit_softcapping: float | None = None,
    accum_dtype: torch.dtype | None = None,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    **kwargs: Any,
) -> None:
    """Has the parameters of Liger's function. A replacement is called with the same arguments."""


_PARAMETERS = tuple(inspect.signature(_expected).parameters)


def _observing(
    observation: Observation, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    def seen(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_defined_in(sys.modules[_MODULE], _NAME, original):
            # This does not call Liger's own function. That one is called only if this fails.
            result, tokens = liger_cross_entropy(
                original, observation.with_correct, *args, **kwargs
            )
        else:
            # Measure first, because the replacement may overwrite its arguments.
            tokens = _measured(observation.with_correct, *args, **kwargs)
            result = compute(*args, **kwargs)
        observation.record(tokens, result)
        return result

    return observation.guard.shielded(original, seen, *args, **kwargs)


LIGER_LOSS = LossHook(_MODULE, _NAME, _observing)


def liger_cross_entropy(
    original: Callable[..., Any], with_correct: bool, *args: Any, **kwargs: Any
) -> tuple[Any, TokenLosses]:
    """Compute the result of Liger's function, and the losses of its tokens.

    Args:
        original: Liger's `fixed_fused_linear_cross_entropy`; only its signature is used.
        with_correct: whether to measure which tokens are predicted.
        args, kwargs: its arguments.

    Returns:
        What `original` would return, and the token losses without gradients.

    Raises:
        UnsupportedVersionError: Liger is too old or has another signature, or an option makes its
            token losses differ from the plain cross entropy.
    """
    _check_version()
    parameters = tuple(inspect.signature(original).parameters)
    if parameters != _PARAMETERS:
        raise UnsupportedVersionError(
            f"{_NAME} of Liger has the parameters {parameters}, but {_PARAMETERS} were expected; "
            "use a tested version (see docs/fused_losses.md), or switch it off."
        )
    given = _bound(original, *args, **kwargs)
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
    with_predictions = (
        with_correct or given["return_token_accuracy"] or given["return_predicted_tokens"]
    )
    nll, predicted = _losses_and_predictions(given, bias, with_predictions)
    plain = nll.detach()
    correct = None if predicted is None else predicted == target
    # Dynamic fine-tuning multiplies each loss by the probability of its target, as a constant.
    trained = nll * torch.exp(-plain) if scaled else nll
    num_counted = (target != given["ignore_index"]).sum()
    num_items = given["num_items_in_batch"]
    # If no token is counted, Liger's mean is 0.
    loss = trained.sum() / (num_counted.clamp(min=1) if num_items is None else num_items)
    tokens = TokenLosses(plain, correct, target, plain.sum())
    return _output(loss, given, predicted, correct, num_counted), tokens


def _measured(with_correct: bool, *args: Any, **kwargs: Any) -> TokenLosses:
    """Token losses by Liger's kernel, from the arguments of a function that replaced Liger's."""
    _check_version()
    given = _bound(_expected, *args, **kwargs)
    target: Tensor = given["target"]
    with torch.no_grad():
        nll, predicted = _losses_and_predictions(given, given["kwargs"].get("bias"), with_correct)
    correct = None if predicted is None else predicted == target
    return TokenLosses(nll, correct, target, nll.sum())


def _losses_and_predictions(
    given: dict[str, Any], bias: Tensor | None, with_predictions: bool
) -> tuple[Tensor, Tensor | None]:
    head = HeadInputs(
        hidden=given["hidden_states"],
        weight=given["lm_head_weight"],
        target=given["target"],
        bias=bias,
        ignore_index=given["ignore_index"],
        with_correct=with_predictions,
    )
    return liger_losses_and_predictions(
        head, softcap=given["final_logit_softcapping"], accum_dtype=given["accum_dtype"]
    )


def _output(
    loss: Tensor,
    given: dict[str, Any],
    predicted: Tensor | None,
    correct: Tensor | None,
    num_counted: Tensor,
) -> Any:
    """The loss in the form that Liger returns for these arguments."""
    if not (given["return_token_accuracy"] or given["return_predicted_tokens"]):
        return loss
    assert correct is not None
    # Ignored positions are left out: they are no tokens.
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


def _bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments) | {"kwargs": dict(bound.arguments["kwargs"])}
