"""Settings that every test needs."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

settings.register_profile("local", deadline=None, max_examples=60)
settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# The tensors here are tiny: more threads only cost time, and CI has few cores.
torch.set_num_threads(1)
