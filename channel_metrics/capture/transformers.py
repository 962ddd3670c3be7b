"""Observes the loss of a transformers model while the trainer computes it.

transformers' losses for language models end in `loss_utils.fixed_cross_entropy`. During one
`compute_loss`, that name points to a function of ours. It computes the same in two steps, token
losses and then their sum or mean (see `channel_metrics.losses.cross_entropy`). If another library
has replaced the function, its function computes the loss unchanged, and the token losses are
measured on its logits, with a second softmax. Liger's fused loss is watched in the same way, see
`liger`. For losses that use neither function, see `reader`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.loss import loss_utils
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from channel_metrics.capture.liger import LIGER_LOSS
from channel_metrics.capture.observation import LossHook, Observation, is_defined_in
from channel_metrics.core.faults import FaultGuard
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.losses.cross_entropy import TokenLosses, cross_entropy, token_losses_of_logits

__all__ = ["check_loss_hook", "is_causal", "observe_loss"]

logger = logging.getLogger("channel_metrics")

# Earlier releases cut the last label off before the loss.
_OLDEST = "4.51"
_NAME = "fixed_cross_entropy"
_PARAMETERS = ("source", "target", "num_items_in_batch", "ignore_index")


def check_loss_hook() -> None:
    """Raise `UnsupportedVersionError` if transformers is too old, or its loss an unknown one."""
    if Version(transformers.__version__) < Version(_OLDEST):
        raise UnsupportedVersionError(
            f"channel metrics need transformers {_OLDEST} or later, but {transformers.__version__} "
            "is installed, whose losses get other labels than the batch holds; update transformers."
        )
    function = getattr(loss_utils, _NAME)
    if not _is_own(function):
        # transformers calls a replacement with the same arguments.
        return
    parameters = tuple(inspect.signature(function).parameters)
    if parameters[: len(_PARAMETERS)] != _PARAMETERS:
        raise UnsupportedVersionError(
            f"transformers {transformers.__version__} has a fixed_cross_entropy with parameters "
            f"{parameters}, but {_PARAMETERS} were expected; take one of docs/compatibility.md."
        )


@contextmanager
def observe_loss(
    model: torch.nn.Module,
    *,
    with_correct: bool,
    with_entropy: bool = False,
    guard: FaultGuard | None = None,
) -> Iterator[Observation]:
    """Observe the cross entropies and the outputs of `model` inside the block.

    Args:
        model: the model as the trainer calls it.
        with_correct: whether to measure which tokens are predicted.
        with_entropy: whether to measure the entropy of what is predicted.
        guard: decides what an error of ours inside the model's loss does; None raises it.
    """
    observation = Observation(with_correct, guard or FaultGuard(), with_entropy=with_entropy)
    with ExitStack() as stack:
        for module in _as_called(model):
            stack.enter_context(_forwards_seen(module, observation))
        stack.enter_context(observation.active())
        stack.enter_context(_CROSS_ENTROPY.placed())
        stack.enter_context(LIGER_LOSS.placed())
        yield observation


def _as_called(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model, and the model inside a parallel wrapper: a script may call either."""
    parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    inner = getattr(model, "module", None) if isinstance(model, parallel) else None
    return [model] if inner is None else [model, inner]


@contextmanager
def _forwards_seen(module: Any, observation: Observation) -> Iterator[None]:
    """A block in which the observation learns when forwards of the module begin and end."""
    compiled = module._compiled_call_impl
    if compiled is None:
        begins = module.register_forward_pre_hook(observation.begin_forward, with_kwargs=True)
        ends = module.register_forward_hook(observation.end_forward, always_call=True)
        try:
            yield
        finally:
            begins.remove()
            ends.remove()
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        observation.begin_forward(module, args, kwargs)
        outputs = None
        try:
            outputs = compiled(*args, **kwargs)
        finally:
            observation.end_forward(module, args, outputs)
        return outputs

    # `model.compile()` would compile hooks into the graph, so its call is wrapped instead.
    module._compiled_call_impl = call
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def _observing_cross_entropy(
    observation: Observation, original: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    def seen(compute: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        source, target, num_items, ignored = _arguments(*args, **kwargs)
        wanted = {
            "with_correct": observation.with_correct,
            "with_entropy": observation.with_entropy,
        }
        if _is_own(original) and _is_plain(original, source, target, num_items):
            loss, tokens = _two_steps(source, target, num_items, ignored, **wanted)
        else:
            # Measure first, because the replacement may overwrite the logits with their gradient.
            tokens = token_losses_of_logits(source.detach(), target, ignore_index=ignored, **wanted)
            loss = compute(*args, **kwargs)
        observation.record(tokens, loss, source)
        return loss

    loss: Tensor = observation.guard.shielded(original, seen, *args, **kwargs)
    return loss


_CROSS_ENTROPY = LossHook(loss_utils.__name__, _NAME, _observing_cross_entropy)


def _arguments(
    source: Tensor,
    target: Tensor,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **_: Any,
) -> tuple[Tensor, Tensor, Any, int]:
    return source, target, num_items_in_batch, ignore_index


def _is_own(function: Any) -> bool:
    """Whether `function` is transformers' own cross entropy."""
    return is_defined_in(loss_utils, _NAME, function)


def _two_steps(
    source: Tensor,
    target: Tensor,
    num_items_in_batch: Tensor | int | None,
    ignore_index: int,
    **wanted: bool,
) -> tuple[Tensor, TokenLosses]:
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss, token_losses = cross_entropy(
        source, target, reduction=reduction, ignore_index=ignore_index, **wanted
    )
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    return loss, token_losses


# {(reduction, the cross entropy of torch, which Liger may replace): whether it is plain}
_verified: dict[tuple[str, Any], bool] = {}


def _is_plain(
    original: Callable[..., Tensor], source: Tensor, target: Tensor, num_items: Any
) -> bool:
    """Whether the two steps give the value of transformers, tried once on up to 8 rows."""
    key = ("mean" if num_items is None else "sum", torch.nn.functional.cross_entropy)
    if key not in _verified:
        with torch.no_grad():
            few = source[:8].detach().clone()
            targets = torch.arange(len(few), device=target.device) % source.shape[-1]
            ours, _ = _two_steps(few, targets, num_items, -100, with_correct=False)
            _verified[key] = torch.equal(ours, original(few, targets, num_items))
        if not _verified[key]:
            logger.warning(
                "transformers' fixed_cross_entropy is not plain cross entropy here: token losses "
                "are measured on the logits, with a second softmax."
            )
    return _verified[key]


def is_causal(model: Any) -> bool | None:
    """Whether a model of this class predicts the next token; None for an unknown class.

    Args:
        model: a model. In a wrapper (DDP, torch.compile, DeepSpeed) or an adapter of PEFT, the
            model inside counts.
    """
    for name in ("_orig_mod", "module", "_fsdp_wrapped_module", "_orig_mod"):
        model = getattr(model, name) if name in getattr(model, "_modules", ()) else model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = {parent.__name__ for parent in type(model).__mro__}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if kinds.intersection(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return True
    return False if kinds.intersection(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) else None
