"""A forward pass during training that leaves no trace.

A forward can change random states (of torch on every device of the model, of numpy, of Python),
the mode of every submodule, buffers, the cache of autocast, and what FSDP2 holds in memory. All of
these are restored. Modes are set one by one, without `train()` and `eval()`. Some modules do more
in these methods, such as merging adapter weights, which cannot be undone bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from channel_metrics.errors import UnsupportedVersionError

__all__ = ["forward_module", "keep_random_state", "undisturbed"]

# A larger buffer might not fit in memory twice. It is not copied; a change of it is an error.
_COPIED_BYTES = 16 * 2**20


def forward_module(model: Any) -> Any:
    """The module to call for a forward without training.

    For DistributedDataParallel it is the model inside, because the wrapper would send the buffers
    of the first rank to the others. Sharded models need their wrapper.
    """
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, parallel) else model


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A block for forwards of `model`, without gradients, in evaluation mode, without a trace.

    Raises `UnsupportedVersionError` if the model changed a buffer that is too large to restore.
    """
    with ExitStack() as stack:
        stack.enter_context(keep_random_state(parameter.device for parameter in model.parameters()))
        stack.enter_context(_evaluating(model))
        stack.enter_context(_keep_buffers(model))
        stack.enter_context(_no_autocast_cache())
        stack.enter_context(torch.no_grad())
        stack.callback(_reshard, model)
        yield


@contextmanager
def keep_random_state(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restore the random states of torch, numpy and Python after the block.

    devices: the devices besides the CPU on which torch may draw random numbers.
    """
    others = {device for device in devices if device.type not in ("cpu", "meta")}
    of_devices = [(device, _device_generator(device, "get")) for device in others]
    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        for device, state in of_devices:
            _device_generator(device, "set", state)


def _device_generator(device: torch.device, action: str, *state: Tensor) -> Any:
    functions = torch.get_device_module(device)
    # The functions of MPS take no device, because there is only one.
    where = () if device.type == "mps" else (device,)
    return getattr(functions, f"{action}_rng_state")(*state, *where)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _keep_buffers(model: nn.Module) -> Iterator[None]:
    held = [
        (module, name, buffer, buffer.clone() if _is_small(buffer) else None, buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for module, name, buffer, copy, version in held:
            module._buffers[name] = buffer
            if copy is not None:
                with torch.no_grad():
                    buffer.copy_(copy)
            elif buffer._version != version:
                raise UnsupportedVersionError(
                    f"a forward in evaluation mode changed the buffer {name!r} of a "
                    f"{type(module).__name__} ({buffer.nbytes >> 20} MiB), which is too large to "
                    "be put back: training would go on with another value. Leave the probe out "
                    "for this model."
                )


def _is_small(buffer: Tensor) -> bool:
    return buffer.nbytes <= _COPIED_BYTES


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Switch the cache off: a training forward must not find weights cast without gradients."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _reshard(model: nn.Module) -> None:
    """Shard the root again. FSDP2 keeps its weights together after a forward, for a backward."""
    for module in model.modules():
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None and hasattr(module, "unshard"):
            reshard()
