"""torchvision for tests of vision models, in processes of their own.

`make env` lays torchvision and qwen-vl-utils beside the environment, where nothing else finds them.
The tests run with a CPU build of torch, and the registry's torchvision is built for CUDA: its
compiled operators do not load. Qwen's processors use only its Python part. That part imports if
two operators are declared.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(sys.prefix) / "vision"
needs_vision = pytest.mark.skipif(
    not FOLDER.exists(), reason="torchvision is only beside the main environment: `make env`"
)


def load_torchvision() -> None:
    """Make torchvision and qwen-vl-utils importable. Call it before transformers is imported."""
    sys.path.append(str(FOLDER))
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
        importlib.import_module("torchvision")
