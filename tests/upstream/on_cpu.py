"""A plugin for pytest: TRL's defaults ask for bfloat16, which transformers refuses on a CPU."""

from __future__ import annotations

import torch
from transformers import training_args

if not torch.accelerator.is_available():
    training_args.is_torch_bf16_gpu_available = lambda: True
