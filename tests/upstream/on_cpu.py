"""A plugin for pytest: without a GPU, it lets tests run that can, and skips those that harm others.

TRL's defaults ask for bfloat16, which transformers refuses on a CPU. Tests of Liger's kernels fail
there, and they leave Liger's functions in the models, so that all later tests fail as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import training_args

if not torch.accelerator.is_available():
    arguments: Any = training_args
    arguments.is_torch_bf16_gpu_available = lambda: True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    for item in items:
        if "liger" in item.name:
            item.add_marker(pytest.mark.skip(reason="Liger's kernels need a GPU"))
