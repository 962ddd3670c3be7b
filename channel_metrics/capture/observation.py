"""Records the losses that the forwards of one model compute, and watches loss functions.

A cross entropy belongs to the model if it is computed while the model's forward runs, or later over
the logits that the forward returned. Losses of another model, such as a teacher, do not count.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.faults import FaultGuard
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.losses.cross_entropy import TokenLosses

__all__ = ["Forward", "LossHook", "Observation", "current_observation", "is_defined_in"]

_LABELS = ("labels", "shift_labels")


@dataclass(eq=False)
class Forward:
    """One forward of the model.

    Attributes:
        has_labels: whether labels were passed to it.
        trains: whether gradients were enabled.
        losses: the cross entropies, in the order in which they were computed.
        outputs: what the model returned. It is kept only if token losses may be measured on it.
        its_logits: a weak reference to the logits in the outputs.
    """

    has_labels: bool = False
    trains: bool = False
    losses: list[TokenLosses] = field(default_factory=list)
    outputs: Any = None
    its_logits: weakref.ref[Tensor] | None = None

    def logits(self) -> Tensor | None:
        """The logits that the model returned; None if it returned none."""
        return _logits_of(self.outputs)

    def loss(self) -> Tensor | None:
        """The loss that the model returned, a tensor of one number; None if it returned none."""
        found = self.outputs.get("loss") if isinstance(self.outputs, Mapping) else None
        if isinstance(self.outputs, tuple):
            found = next((x for x in self.outputs if isinstance(x, Tensor) and x.dim() == 0), None)
        # nn.DataParallel returns one loss per replica, which is not one number.
        return found if isinstance(found, Tensor) and found.numel() == 1 else None

    def gave(self, source: Tensor) -> bool:
        """Whether `source` shares its memory with the logits that the model returned."""
        logits = None if self.its_logits is None else self.its_logits()
        return logits is not None and _address(logits) == _address(source)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _logits_of(outputs: Any) -> Tensor | None:
    found = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if isinstance(outputs, tuple):
        found = next((x for x in outputs if isinstance(x, Tensor) and x.dim() == 3), None)
    return found if isinstance(found, Tensor) else None


@dataclass(eq=False)
class Observation:
    """What was seen during one `compute_loss`.

    Attributes:
        with_correct: whether to measure which tokens are predicted.
        with_entropy: whether to measure the entropy of what is predicted, if there are logits.
        guard: decides what an error of ours inside the model's loss does.
        forwards: the forwards of the model.
        others: trained losses that were computed outside of the forwards, over other logits.
        busy: whether a watched loss function is running.
    """

    with_correct: bool
    guard: FaultGuard = field(default_factory=FaultGuard)
    forwards: list[Forward] = field(default_factory=list)
    others: list[TokenLosses] = field(default_factory=list)
    busy: bool = False
    with_entropy: bool = False
    _depth: int = 0

    @property
    def losses(self) -> list[TokenLosses]:
        """The cross entropies of all forwards."""
        return [found for forward in self.forwards for found in forward.losses]

    def chosen(self) -> Forward:
        """The forward that the labels of the batch belong to.

        Raises `UnsupportedVersionError` if several forwards may be the one.
        """
        if not self.forwards:
            return Forward(losses=self.others)
        found = self._candidates()
        if len(found) > 1:
            raise UnsupportedVersionError(
                f"the model ran {len(self.forwards)} forwards in one step, and {len(found)} of "
                "them may be the one that the labels belong to. Pass the labels to that one alone "
                "(`model(..., labels=labels)`), or detach the metrics."
            )
        return found[0]

    def _candidates(self) -> list[Forward]:
        found = self.forwards
        found = [forward for forward in found if forward.trains] or found
        found = [forward for forward in found if forward.has_labels] or found
        return [forward for forward in found if forward.losses] or found

    def record(self, tokens: TokenLosses, loss: Any, logits: Tensor | None = None) -> None:
        """Keep a cross entropy if it belongs to the model.

        Args:
            tokens: its token losses.
            loss: its result.
            logits: what it was computed from, if known.
        """
        if self._depth:
            self.forwards[-1].losses.append(tokens)
            return
        for forward in self.forwards:
            if logits is not None and forward.gave(logits):
                forward.losses.append(tokens)
                return
        # A script may call parts of the model, not its forward. A teacher has a loss without grad.
        if isinstance(loss, Tensor) and loss.requires_grad:
            self.others.append(tokens)

    def begin_forward(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook for the model and its wrappers. Only the outermost forward counts."""
        if not self._is_ours():
            return
        if self._depth == 0:
            has_labels = any(kwargs.get(key) is not None for key in _LABELS)
            self.forwards.append(Forward(has_labels, torch.is_grad_enabled()))
        self._depth += 1

    def end_forward(self, _model: Any, _args: Any, outputs: Any) -> None:
        """A forward hook, called also if the forward raised an error."""
        if not self._is_ours() or not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        forward = self.forwards[-1]
        logits = _logits_of(outputs)
        forward.its_logits = None if logits is None else weakref.ref(logits)
        forward.outputs = outputs
        # Logits are large, so they are kept only if the token losses may be measured on them.
        held = self._candidates()
        for one in self.forwards:
            if one.losses or len(held) > 1 or one is not held[0]:
                one.outputs = None

    def _is_ours(self) -> bool:
        # Replicas of nn.DataParallel run in their own threads and are not observed. If another
        # observation was opened inside this one, the forward belongs to that.
        return current_observation() is self

    @contextmanager
    def active(self) -> Iterator[None]:
        """A block in which the losses that this thread computes belong to this observation."""
        active = _active_here()
        active.append(self)
        try:
            yield
        finally:
            active.remove(self)


# The observations of each thread; the innermost one comes last.
_active = threading.local()


def _active_here() -> list[Observation]:
    found: list[Observation] = _active.__dict__.setdefault("observations", [])
    return found


def current_observation() -> Observation | None:
    """The innermost observation of this thread; None if there is none."""
    # A compiled graph must not hold our state. Its token losses are measured on the logits.
    if torch.compiler.is_compiling():
        return None
    active = _active_here()
    return active[-1] if active else None


class LossHook:
    """Watches the loss function `module.name` during a block.

    Blocks may be nested, and several threads may have one. The first block replaces the function,
    and the last one puts it back. Without an observation, the replaced function is called.

    Args:
        module: the name of the module.
        name: the name of the function.
        observing: called as `observing(observation, function, *args, **kwargs)` if there is an
            observation. It must return what the replaced `function` would.
    """

    def __init__(self, module: str, name: str, observing: Callable[..., Any]) -> None:
        self._module, self._name, self._observing = module, name, observing
        self._lock = threading.Lock()
        self._blocks = 0
        self._original: Any = None
        self._watching: Any = None

    @contextmanager
    def placed(self) -> Iterator[None]:
        """A block that watches the function.

        It does nothing if the module is not imported, or if this version of it has no such
        function.
        """
        module: Any = sys.modules.get(self._module)
        if not hasattr(module, self._name):
            yield
            return
        with self._lock:
            found = getattr(module, self._name)
            if found is not self._watching:
                # Use the same wrapper again if possible: torch.compile recompiles for a new one.
                if found is not self._original:
                    self._original, self._watching = found, self._watched(found)
                setattr(module, self._name, self._watching)
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                # If another library has replaced the function meanwhile, leave it.
                if not self._blocks and getattr(module, self._name) is self._watching:
                    setattr(module, self._name, self._original)

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        observing = self._observing

        @functools.wraps(original)
        def watching(*args: Any, **kwargs: Any) -> Any:
            observation = current_observation()
            # The function may call another watched function: only the outer one is observed.
            if observation is None or observation.busy:
                return original(*args, **kwargs)
            observation.busy = True
            try:
                return observing(observation, original, *args, **kwargs)
            finally:
                observation.busy = False

        return watching


def is_defined_in(module: Any, name: str, function: Any) -> bool:
    """Whether `function` is the one that the source of `module` defines as `name`.

    The attribute of the module is not compared, because it may have been replaced before.
    """
    code: Any = getattr(function, "__code__", None)
    return getattr(function, "__globals__", None) is vars(module) and code.co_name == name
