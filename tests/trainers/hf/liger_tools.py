"""What the runs with Liger share; its kernels run in Triton's interpreter, see `interpreted`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The loss only: other kernels of Liger do not run in the interpreter.
LOSS_ONLY = {"rms_norm": False, "rope": False, "swiglu": False}

needs_liger = pytest.mark.skipif(
    not (util.find_spec("triton") and util.find_spec("liger_kernel")),
    reason="it needs liger-kernel and triton, which are for Linux: `make test` there runs this",
)


class Largest(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary that an operator makes."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.vocabulary = vocabulary
        self.num_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, wide = func(*args, **(kwargs or {})), self.vocabulary
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2 and leaf.shape[-1] == wide:
                self.num_rows = max(self.num_rows, leaf.numel() // wide)
        return found


def interpreted(program: Path, folder: Path) -> dict[str, Any]:
    """The JSON that `python PROGRAM FOLDER` prints last.

    A process of its own, because Triton decides when a kernel is defined whether it will be
    interpreted: the program sets TRITON_INTERPRET first of all.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(program), str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
