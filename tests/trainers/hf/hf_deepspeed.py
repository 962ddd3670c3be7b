"""DeepSpeed on the CPU. Importing this imports DeepSpeed: only for the ranks that use it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

from accelerate.state import PartialState

# The attribute `deepspeed.comm.torch` is torch itself.
BACKEND: Any = import_module("deepspeed.comm.torch")


def without_shared_memory() -> None:
    """Shared memory collectives are compiled at first use; without them DeepSpeed takes gloo."""
    assert callable(BACKEND.build_shm_op)
    BACKEND.build_shm_op = lambda: None


def use_cpu() -> None:
    """The set-up of `hf_case_tools.zero`."""
    without_shared_memory()
    prepare_backend = PartialState._prepare_backend

    def with_gloo(state: Any, *args: Any, **kwargs: Any) -> Any:
        # accelerate looks for a GPU to choose a backend, and takes one process if there is none.
        backend, kind = prepare_backend(state, *args, **kwargs)
        return backend or "gloo", kind

    PartialState._prepare_backend = with_gloo
