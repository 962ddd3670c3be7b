"""A mode that remembers which operators torch runs, to show that what is off costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["operators_of"]


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators_of(work: Callable[[], object]) -> list[str]:
    """The operators of `work`, in order. Run it once before, for what only a first call does."""
    seen = _Operators()
    with seen:
        work()
    return seen.names
