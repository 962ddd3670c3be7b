"""What the tests and the ranks of a loop over megatron-core have in common."""

from __future__ import annotations

from fork_client import Preload
from rank_cases import case

MEGATRON = Preload(("megatron_lm.cpu:install", "megatron_loop"))
on_two = case(MEGATRON, ranks=2)
