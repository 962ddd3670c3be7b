"""The collectives of torch.distributed, and a way to see each call of them from Python."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

__all__ = ["COLLECTIVES", "watched"]

COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list",
)  # fmt: skip


def watched(tell: Callable[..., object]) -> dict[str, Any]:
    """{name: collective}. Each calls `tell` first, with its name and the arguments of the call."""

    def watch(name: str, original: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            tell(name, *args, **kwargs)
            return original(*args, **kwargs)

        return call

    return {name: watch(name, getattr(dist, name)) for name in COLLECTIVES}
