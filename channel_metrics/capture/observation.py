"""What one forward of a model shows of its losses, and how loss functions are watched for it."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.faults import FaultGuard
from channel_metrics.losses.cross_entropy import TokenLosses

__all__ = ["LossHook", "Observation", "current_observation", "is_defined_in"]


@dataclass
class Observation:
    """What one `compute_loss` let us see.

    with_correct: whether correctness is measured. guard: what an error of ours inside the model's
    loss does. losses: the cross entropies, in the order in which they were computed. outputs:
    what the model returned, kept only if it computed no cross entropy that we saw.
    """

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

    @contextmanager
    def active(self) -> Iterator[None]:
        """Losses that this thread computes inside the block belong to this observation."""
        _active.append(self)
        try:
            yield
        finally:
            _active.pop()


# The innermost observation comes last.
_active: list[Observation] = []


def current_observation() -> Observation | None:
    """The observation that a loss belongs to which is computed now."""
    # Compiled graphs must not hold our state; their token losses come from the logits.
    if torch.compiler.is_compiling() or not _active:
        return None
    observation = _active[-1]
    return observation if observation.thread == threading.get_ident() else None


class LossHook:
    """Watches the loss function `module.name`, for the time of a block.

    The function that stands there when the block begins is called wherever there is no
    observation; where there is one, `observing(observation, function, *args, **kwargs)` must
    return what that function would.
    """

    def __init__(self, module: str, name: str, observing: Callable[..., Any]) -> None:
        self._module, self._name, self._observing = module, name, observing
        self._original: Any = None
        self._watching: Any = None

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Watch inside the block; nothing happens if nobody has imported the module."""
        module = sys.modules.get(self._module)
        if module is None:
            yield
            return
        before = getattr(module, self._name)
        # Blocks may be nested, or be those of several threads: one function serves them all.
        if before is not self._watching and before is not self._original:
            self._original, self._watching = before, self._watched(before)
        setattr(module, self._name, self._watching)
        try:
            yield
        finally:
            setattr(module, self._name, before)

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        observing = self._observing

        @functools.wraps(original)
        def watching(*args: Any, **kwargs: Any) -> Any:
            observation = current_observation()
            if observation is None:
                return original(*args, **kwargs)
            return observing(observation, original, *args, **kwargs)

        return watching


def is_defined_in(module: Any, name: str, function: Any) -> bool:
    """Whether `function` is the one that the source of `module` defines as `name`.

    Not asked of what the module holds: somebody may have put another one there before we came.
    """
    code: Any = getattr(function, "__code__", None)
    return getattr(function, "__globals__", None) is vars(module) and code.co_name == name
