"""A mode in which a device-to-host synchronisation is an error.

The tensors are on the `meta` device, which holds no values, so that nothing can be read from
them by accident; the mode names the operation that would have had to wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostSyncError(AssertionError):
    """An operation read a device value, or made a shape out of values."""


class NoSync(TorchDispatchMode):
    """`with NoSync(): ...` raises `HostSyncError` where a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if _READS_VALUES & set(func.tags) and not _has_static_shape(func, inputs):
            raise HostSyncError(f"{func} reads values")
        if func is torch.ops.aten.segment_reduce.default and not kwargs.get("unsafe"):
            raise HostSyncError(f"{func} checks the lengths; pass unsafe=True")
        if _destination(func, args, kwargs) == "cpu" != inputs[-1].device.type:
            raise HostSyncError(f"{func} copies to the host")
        return func(*args, **kwargs)


def _destination(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if func is torch.ops.aten.copy_.default:
        return str(args[0].device.type)
    if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type
    return None


def _has_static_shape(func: Any, inputs: list[torch.Tensor]) -> bool:
    # Indexing is tagged for the sake of bool masks; with integers the shape is known.
    indexing = func is torch.ops.aten.index.Tensor
    return indexing and all(tensor.dtype != torch.bool for tensor in inputs[1:])
