"""transformer-engine's own cross entropy, from its source, for Triton's interpreter on the CPU.

Importing the package as a whole needs its compiled libraries and a driver. Its cross entropy is
Python and Triton: those modules alone are loaded, from the sources that `make env` lays beside the
environment. Not its own here: `no_torch_dynamo`, which keeps torch.compile out, and its check of
the inputs, which wants a CUDA tensor.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["SOURCES", "load_transformer_engine"]

SOURCES = Path(sys.prefix) / "sources"
_PACKAGES = ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton")


def load_transformer_engine() -> None:
    """Make `transformer_engine.pytorch.cross_entropy` importable; TRITON_INTERPRET must be set."""
    for name in _PACKAGES:
        package = ModuleType(f"transformer_engine{name}")
        package.__path__ = [str(SOURCES.joinpath(*package.__name__.split(".")))]
        sys.modules[package.__name__] = package
    jit: Any = ModuleType("transformer_engine.pytorch.jit")
    jit.no_torch_dynamo = lambda: lambda function: function
    sys.modules[jit.__name__] = jit
    module: Any = importlib.import_module("transformer_engine.pytorch.cross_entropy")
    module._validate_inputs = lambda *_: None
