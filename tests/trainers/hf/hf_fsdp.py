"""FSDP2 and the parallelism of accelerate on the CPU.

accelerate takes FSDP, and parallelism of other kinds than data, only for devices other than the
CPU: under `use_cpu` it silently trains with DistributedDataParallel. Everything below that
decision runs on the CPU, so the decision is what is changed here.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def use_cpu() -> None:
    """The set-up of `hf_case_tools.fsdp`."""
    set_device = PartialState.set_device

    def not_as_cpu(state: Any) -> None:
        set_device(state)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_XPU

    PartialState.set_device = not_as_cpu
