"""Token losses out of a transformers model while the trainer computes its loss.

transformers' losses for language models end in `loss_utils.fixed_cross_entropy`. For the time
of one `compute_loss`, that name points to a function which does the same in the two steps that
cross entropy is made of, and so sees every token (see `channel_metrics.losses.cross_entropy`).
What does not pass there (label smoothing, `compute_loss_func`, a model with a loss of its own) is
measured on the logits that the model returned, with a second softmax. Liger's fused loss is
watched in the same way, see `liger`. Any other that returns no logits is refused.

Letters: B rows, S row length, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.loss import loss_utils
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from channel_metrics.capture.liger import liger_cross_entropy, replaced_liger_loss
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.faults import FaultGuard
from channel_metrics.errors import ChannelMetricsError, UnsupportedVersionError
from channel_metrics.losses.cross_entropy import TokenLosses, cross_entropy, token_losses_of_logits

__all__ = [
    "Observation",
    "check_loss_hook",
    "find_shift",
    "is_causal",
    "mean_nll",
    "observe_loss",
    "shifted_labels",
    "token_losses_from_outputs",
]

logger = logging.getLogger("channel_metrics")

_PARAMETERS = ("source", "target", "num_items_in_batch", "ignore_index")
_original = loss_utils.fixed_cross_entropy


@dataclass
class Observation:
    """What one `compute_loss` let us see."""

    with_correct: bool
    guard: FaultGuard = field(default_factory=FaultGuard)
    thread: int = field(default_factory=threading.get_ident)
    losses: list[TokenLosses] = field(default_factory=list)
    outputs: Any = None

    def matching(self, num_tokens: int) -> list[TokenLosses]:
        """The cross entropies over exactly `num_tokens` positions."""
        return [found for found in self.losses if found.target.numel() == num_tokens]

    def logits(self) -> Tensor | None:
        """The logits that the model returned, if it did."""
        outputs = self.outputs
        found = outputs.get("logits") if isinstance(outputs, Mapping) else None
        return found if isinstance(found, Tensor) else None

    def loss(self) -> Tensor | None:
        """The loss that the model itself returned, if it did."""
        found = self.outputs.get("loss") if isinstance(self.outputs, Mapping) else None
        return found if isinstance(found, Tensor) else None


# The innermost observation comes last.
_active: list[Observation] = []


def check_loss_hook() -> None:
    """Raise `UnsupportedVersionError` if this transformers has another `fixed_cross_entropy`."""
    parameters = tuple(inspect.signature(_original).parameters)
    if parameters[: len(_PARAMETERS)] != _PARAMETERS:
        import transformers

        raise UnsupportedVersionError(
            f"transformers {transformers.__version__} has a fixed_cross_entropy with parameters "
            f"{parameters}, but {_PARAMETERS} were expected; use a tested version (see README)."
        )


@contextmanager
def observe_loss(
    model: torch.nn.Module, *, with_correct: bool, guard: FaultGuard | None = None
) -> Iterator[Observation]:
    """Observe the cross entropies and the outputs of `model` inside the block.

    guard: what an error of ours inside the model's loss does; None raises it.
    """
    observation = Observation(with_correct, guard or FaultGuard())
    _active.append(observation)
    before = loss_utils.fixed_cross_entropy
    loss_utils.fixed_cross_entropy = _observing_cross_entropy

    def keep_outputs(_model: Any, _args: Any, outputs: Any) -> None:
        # Logits are large: held only if the token losses cannot be had without them.
        if not observation.losses:
            observation.outputs = outputs

    handle = model.register_forward_hook(keep_outputs)
    try:
        with replaced_liger_loss(_observing_liger):
            yield observation
    finally:
        handle.remove()
        loss_utils.fixed_cross_entropy = before
        _active.pop()


def _observing_cross_entropy(
    source: Tensor,
    target: Tensor,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    observation = _current()
    if observation is None:
        return _original(source, target, num_items_in_batch, ignore_index, **kwargs)

    def seen(original: Callable[..., Tensor], items: Any, ignored: int, **options: Any) -> Tensor:
        if not _same_as_original(source, target, items, ignored, options):
            # First: a kernel in its place may overwrite the logits with their gradient.
            observation.losses.append(_second_softmax(observation, source, target, ignored))
            return original(items, ignored, **options)
        loss, token_losses = _two_steps(source, target, items, ignored, observation.with_correct)
        observation.losses.append(token_losses)
        return loss

    original = functools.partial(_original, source, target)
    guard = observation.guard
    loss: Tensor = guard.shielded(original, seen, num_items_in_batch, ignore_index, **kwargs)
    return loss


def _observing_liger(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    observation = _current()
    if observation is None:
        return original(*args, **kwargs)

    # Liger's own function is the way out if this fails, and not called by it.
    def seen(_way_out: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result, token_losses = liger_cross_entropy(
            original, observation.with_correct, *args, **kwargs
        )
        observation.losses.append(token_losses)
        return result

    return observation.guard.shielded(original, seen, *args, **kwargs)


def _current() -> Observation | None:
    """The observation that a loss belongs to which is computed now."""
    # Compiled graphs must not hold our state; their token losses come from the logits.
    if torch.compiler.is_compiling() or not _active:
        return None
    observation = _active[-1]
    return observation if observation.thread == threading.get_ident() else None


def _second_softmax(
    observation: Observation, logits: Tensor, target: Tensor, ignore_index: int
) -> TokenLosses:
    return token_losses_of_logits(
        logits.detach(),
        target,
        ignore_index=ignore_index,
        with_correct=observation.with_correct,
    )


def _two_steps(
    source: Tensor,
    target: Tensor,
    num_items_in_batch: Tensor | int | None,
    ignore_index: int,
    with_correct: bool,
) -> tuple[Tensor, TokenLosses]:
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss, token_losses = cross_entropy(
        source, target, reduction=reduction, ignore_index=ignore_index, with_correct=with_correct
    )
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    return loss, token_losses


_verified: dict[str, bool] = {}


def _same_as_original(
    source: Tensor, target: Tensor, num_items: Any, ignore_index: int, kwargs: Any
) -> bool:
    """Whether the two steps give this transformers' own value, tried once on a few rows."""
    reduction = "mean" if num_items is None else "sum"
    if reduction not in _verified:
        with torch.no_grad():
            few = source[:8].detach()
            targets = torch.arange(len(few), device=target.device) % source.shape[-1]
            ours, _ = _two_steps(few, targets, num_items, ignore_index, False)
            theirs = _original(few, targets, num_items, ignore_index, **kwargs)
        _verified[reduction] = torch.equal(ours, theirs)
        if not _verified[reduction]:
            logger.warning(
                "transformers' fixed_cross_entropy is not plain cross entropy here: token losses "
                "are measured on the logits, with a second softmax."
            )
    return _verified[reduction]


def is_causal(model: Any) -> bool | None:
    """Whether `model` predicts the next token, by its kind; None if that is not known.

    model: not wrapped for several processes; an adapter of PEFT is looked through.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = {parent.__name__ for parent in type(model).__mro__}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if kinds.intersection(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return True
    return False if kinds.intersection(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) else None


def shifted_labels(labels: Tensor) -> Tensor:
    """[..., S] labels as a causal loss sees them: position t holds the label of t + 1."""
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]


def token_losses_from_outputs(observation: Observation, targets: Tensor) -> TokenLosses:
    """Token losses [B * S] on the logits [B, S, V] that the model returned.

    Raises `UnsupportedVersionError` where there are none: a fused loss was used, or the model
    returned a part of them only.
    """
    logits = observation.logits()
    if logits is None and observation.losses:
        raise UnsupportedVersionError(
            f"expected a loss over all labels {list(targets.shape)}, but the model computed it "
            f"over {observation.losses[-1].target.numel()} positions; leave logits_to_keep unset "
            "while metrics are on, or detach them."
        )
    if logits is None:
        raise UnsupportedVersionError(
            "the loss of this model cannot be seen per token: it did not pass transformers' "
            "cross entropy nor Liger's, and the model returned no logits (a fused loss does that, "
            "or a compiled one of Liger's); switch the fused loss off, or detach the metrics."
        )
    if logits.shape[:-1] != targets.shape:
        raise UnsupportedVersionError(
            f"expected logits for all labels {list(targets.shape)}, but the model returned "
            f"{list(logits.shape)}; leave logits_to_keep unset while metrics are on."
        )
    return token_losses_of_logits(
        logits.detach().flatten(0, -2),
        targets.reshape(-1).to(logits.device),
        with_correct=observation.with_correct,
    )


def mean_nll(observation: Observation, labels: Tensor, shift: bool) -> float:
    """The mean nll of the logits that the model returned, with labels shifted or as they are."""
    targets = shifted_labels(labels) if shift else labels
    total = token_losses_from_outputs(observation, targets).reported_sum
    return float(total / (targets != IGNORE_INDEX).sum().clamp(min=1))


def find_shift(target: Tensor, labels: Tensor, *, may_shift: bool) -> bool:
    """Whether the loss saw shifted labels; one look at the first batch."""
    flat = target.to(labels.device)
    if may_shift and torch.equal(flat, shifted_labels(labels).reshape(-1)):
        return True
    if torch.equal(flat, labels.reshape(-1)):
        return False
    seen, given = (int((ids != IGNORE_INDEX).sum()) for ids in (flat, labels))
    raise ChannelMetricsError(
        "the model's loss must see the labels of the batch, shifted by one or as they are, but "
        f"it saw others (shape {list(labels.shape)}, {seen} supervised against {given} in the "
        "batch); tokens cannot be matched to their channels. Detach the metrics for this model."
    )
