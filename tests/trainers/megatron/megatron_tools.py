"""What the tests and the ranks of a loop over megatron-core have in common."""

from __future__ import annotations

from fork_client import Preload
from rank_cases import case


def use_cpu() -> None:
    """Import Megatron's core, which asks for CUDA when it is imported."""
    import warnings

    from megatron_lm import cpu

    cpu.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron_loop  # noqa: F401


MEGATRON = Preload(("megatron_tools:use_cpu",))
on_two = case(MEGATRON, ranks=2)
