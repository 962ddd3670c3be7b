"""`Ranks`: which processes count together, and where their collectives run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from channel_metrics.errors import CollectiveError

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """The ranks that count together. Every token is counted by one of them.

    group: their process group; None is the default one. If torch.distributed is not initialised,
        there is one rank.
    device: where a collective runs; None asks the backend. It does not depend on the device of
        the tokens, because a rank that counts nothing takes part, too.
    alone: this rank trains by itself, even if there is a process group. Nothing is sent.
    """

    group: dist.ProcessGroup | None = None
    device: torch.device | None = None
    alone: bool = False

    @property
    def is_one(self) -> bool:
        """Whether this rank counts alone."""
        return self.alone or not dist.is_available() or not dist.is_initialized()

    @property
    def rank(self) -> int:
        """The number of this rank in the group."""
        return 0 if self.is_one else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return 1 if self.is_one else dist.get_world_size(self.group)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks, on the host; `CollectiveError` if that fails."""
        try:
            moved = values.to(self.device or self._device_of_backend())
            dist.all_reduce(moved, op=dist.ReduceOp.SUM, group=self.group)
            return moved.cpu()
        except Exception as error:  # each backend has its own errors
            raise CollectiveError(
                f"the all-reduce of the channel sums failed ({error}). The ranks may be out of "
                "step, so the run cannot go on."
            ) from error

    def _device_of_backend(self) -> torch.device:
        backend = str(dist.get_backend(self.group))
        if "gloo" in backend or backend == "mpi":
            return torch.device("cpu")
        if "nccl" in backend:
            return torch.device("cuda", torch.cuda.current_device())
        # XPU, NPU and others: the accelerator that this torch was built for.
        found = torch._C._get_accelerator()
        if found.type == "cpu":
            return found
        return torch.device(found.type, torch.get_device_module(found).current_device())
