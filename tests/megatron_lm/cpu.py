"""Lets Megatron's hard-coded CUDA calls land on the CPU. For tests only.

Megatron asks for CUDA devices, streams and random number generators by name, without asking
whether there is one. Here a device `cuda` is the CPU, a stream does everything at once, and the
CUDA generator is the CPU's. The training loop, the schedules, the optimizers, the datasets and
the collectives (over gloo) are Megatron's own and unmodified.

What a run like this cannot show:
- NCCL: asynchronous streams, the order of work on a device, what a host sync costs;
- TransformerEngine's kernels: `cpu_layers` has stand-ins for attention and norms, written for
  these tests, so a context-parallel run shows how batches are cut and sums are reduced, not that
  TransformerEngine computes the same;
- CUDA graphs, FP8, torch.compile (switched off: its fusions are for a GPU);
- layouts against each other with dropout: drawn from one generator, the masks differ.

Call `install()` before anything imports Megatron, and `install_megatron()` after.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import time
import types
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

# Before torch is imported, which reads them.
os.environ.update(
    TORCH_COMPILE_DISABLE="1",
    TORCHDYNAMO_DISABLE="1",
    CUDA_DEVICE_MAX_CONNECTIONS="1",  # Megatron insists on it for tensor parallelism
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
)

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
MEMORY_BYTES = 1 << 34


def is_cuda(device: Any) -> bool:
    """Whether `device` means a GPU, as a device, a name, or an ordinal."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class CudaIsCpu(TorchFunctionMode):
    """Every call of torch from Python that names a CUDA device gets the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers assert `torch.cuda.FloatTensor`.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if kwargs.get("device") is not None and is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


class Event:
    """A point in time: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter()

    def record(self, *_: Any) -> None:
        self.seconds = time.perf_counter()

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return (end.seconds - self.seconds) * 1e3


class Stream:
    """Work of the CPU is done when the call returns."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True


def nothing(*_: Any, **__: Any) -> None: ...


@contextmanager
def no_context(*_: Any, **__: Any) -> Iterator[None]:
    yield


def install() -> None:
    """Replace what torch has of CUDA, in this process and those forked from it."""
    # Its tables of rules refuse names that are bound to one function, as ours are.
    import torch._dynamo

    replace(torch.cuda, devices() | streams() | random_numbers())
    replace(torch.cuda.random, random_numbers())
    replace(torch.cuda.nvtx, dict.fromkeys(("range_push", "range_pop", "mark"), nothing))
    replace(torch.cuda.nvtx, {"range": no_context})
    # Megatron decorates functions with it at import.
    replace(torch, {"compile": lambda model=None, **_: model if model else lambda fn: fn})
    # Else autograd and the data loader look for a device behind the names above.
    replace(torch.accelerator, {"is_available": lambda: False})
    replace(torch.utils.data.DataLoader, {"__init__": unpinned_loader()})
    ExitStack().enter_context(CudaIsCpu())  # which nobody closes


def install_megatron() -> None:
    """The two places of Megatron itself that need help, and two that take most of a short run."""
    import megatron.core.datasets.utils
    import megatron.training.initialize
    from megatron.core.dist_checkpointing.strategies import filesystem_async as saving
    from megatron.training.argument_utils import ArgumentGroupFactory as Factory
    from megatron.training.arguments import add_megatron_arguments

    # It runs `make`, for which the wheel has no Makefile and a checkout needs a compiler.
    use_compiled_helpers()
    replace(megatron.core.datasets.utils, {"compile_helpers": nothing})
    # It draws as many random numbers as the layout has shards. On a GPU they come from another
    # generator than the weights do; here the weights would depend on the layout.
    replace(megatron.training.initialize, {"_warmup_jit_function": nothing})
    # Each rank starts a process for its first checkpoint. Spawned, that would import all again.
    # `test_channels_resume` has a run with a spawned one.
    replace(saving, {"get_write_results_queue": partial(saving.get_write_results_queue, "fork")})
    # Each rank parses the source of each class whose fields are options.
    read = cache(partial(Factory._get_field_docstrings, Factory.__new__(Factory)))
    replace(Factory, {"_get_field_docstrings": lambda self, source: read(source)})
    add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def replace(owner: Any, names: dict[str, Any]) -> None:
    for name, value in names.items():
        setattr(owner, name, value)


def devices() -> dict[str, Any]:
    properties = types.SimpleNamespace(
        name="cpu", major=8, minor=0, multi_processor_count=1, total_memory=MEMORY_BYTES
    )
    silent = (
        "set_device", "synchronize", "empty_cache", "ipc_collect", "init", "_lazy_init",
        "reset_peak_memory_stats", "reset_max_memory_allocated", "check_error",
    )  # fmt: skip
    return dict.fromkeys(silent, nothing) | {
        "is_available": lambda: True,
        # Not 0, at which Megatron leaves out its process groups. Read at each call: the ranks
        # are forked later, and have an environment of their own.
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: 0,
        "is_initialized": lambda: False,
        "device": no_context,
        "device_memory_used": lambda *_: 0,
        "memory_stats": lambda *_, **__: defaultdict(int),
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        "get_device_capability": lambda *_: (8, 0),
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: properties,
        "_lazy_call": lambda callback, **_: callback(),
    }


def streams() -> dict[str, Any]:
    only = Stream()
    return {
        "Stream": Stream,
        "Event": Event,
        "stream": no_context,
        "set_stream": nothing,
        "current_stream": lambda *_: only,
        "default_stream": lambda *_: only,
    }


def random_numbers() -> dict[str, Any]:
    generator = torch.default_generator
    return {
        "default_generators": (generator,),
        "get_rng_state": lambda *_, **__: generator.get_state(),
        "set_rng_state": lambda state, *_, **__: generator.set_state(state),
        "manual_seed": lambda seed: generator.manual_seed(int(seed)),
        "manual_seed_all": nothing,
        "seed": nothing,
        "initial_seed": generator.initial_seed,
    }


def unpinned_loader() -> Any:
    """`DataLoader.__init__` without pinned memory, which needs a driver."""
    init = torch.utils.data.DataLoader.__init__

    def unpinned(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "pin_memory": False})

    return unpinned


def use_compiled_helpers() -> None:
    """A Megatron-LM checkout in front of the wheel uses the index builder of the wheel."""
    import megatron

    name = "megatron.core.datasets.helpers_cpp"
    if importlib.util.find_spec(name) is not None:
        return
    for folder in megatron.__path__:
        for path in Path(folder).glob("core/datasets/helpers_cpp*.so"):
            loader = importlib.machinery.ExtensionFileLoader(name, str(path))
            spec = importlib.util.spec_from_loader(name, loader)
            assert spec is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
            return
    raise ImportError(f"no compiled {name}; install the wheel of megatron-core beside the checkout")
