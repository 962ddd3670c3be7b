"""Lets the real Megatron-Bridge run on the CPU, with stubs for packages that need a GPU.

CUDA is the CPU, as in `megatron_lm.cpu`. These packages are empty here, because Bridge imports them
at its start, whether they are used or not: any attribute of them is an empty class. `CALLED` lists
the functions of them that these tests call.

megatron-core must not see them, as it would then ask TransformerEngine for layers. So the modules
of megatron-core that look for them are imported before.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

STUBS = ("transformer_engine", "modelopt", "megatron.energon", "nvidia_resiliency_ext")

# The functions of the stubs that a training calls. They have nothing to do without a teacher or
# quantized weights.
CALLED = (
    ("modelopt.torch.distill.plugins.megatron", "get_tensor_shapes_adjust_fn_for_distillation"),
    ("modelopt.torch.opt.plugins", "save_sharded_modelopt_state"),
)


class Empty(type):
    """The class of attributes that do not exist; attributes of these do not exist either."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name, (), {})


class EmptyModule(types.ModuleType):
    """A package without contents."""

    __path__: list[str] = []  # noqa: RUF012 - the import system reads it
    __version__ = "2.9.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, Empty(name, (), {}))
        return vars(self)[name]


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stubs, and all modules below them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(f"{name}.".startswith(f"{stub}.") for stub in STUBS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def prepare() -> None:
    """Import the CPU stand-ins and Megatron-Bridge."""
    from megatron_lm import cpu, cpu_layers

    cpu.install()
    import_core()
    cpu.install_megatron()
    sys.meta_path.append(Finder())
    for module, function in CALLED:
        importlib.import_module(module).__dict__[function] = cpu.nothing
    for name in (
        "megatron.bridge.training.pretrain",
        "megatron.bridge.training.gpt_step",
        "megatron.bridge.data.packing.parquet",
        "torch.utils.tensorboard",
        "transformers.models.auto.tokenization_auto",
        "channel_metrics.cli.main",
    ):
        importlib.import_module(name)
    # As in `megatron_lm.cpu`: else the weights would depend on the layout.
    initialize = importlib.import_module("megatron.bridge.training.initialize")
    initialize.__dict__["_warmup_jit_function"] = cpu.nothing
    cpu_layers.install()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose {len(threads) - 1} threads"


def import_core() -> None:
    """Import what of megatron-core asks for the packages that have stubs."""
    import megatron.core

    folder = Path(megatron.core.__path__[0])
    asks = re.compile(rf"^ *(import|from) ({'|'.join(STUBS)})", re.MULTILINE)
    for path in sorted(folder.rglob("*.py")):
        if asks.search(path.read_text()):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join(("megatron", "core", *parts)).removesuffix(".__init__")
            try:
                importlib.import_module(name)
            except ImportError:  # of other packages that are not here either
                continue
