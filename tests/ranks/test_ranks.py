"""`Ranks`: who counts together, and on which device a collective runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from channel_metrics.errors import CollectiveError
from channel_metrics.ranks.ranks import Ranks


def test_without_a_process_group_there_is_one_rank() -> None:
    ranks = Ranks()
    assert (ranks.is_one, ranks.rank, ranks.size) == (True, 0, 1)


class FakeDist:
    """A backend of three ranks that cannot be had here: keeps the device of what is reduced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.devices: list[torch.device] = []
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_backend", lambda group: backend)
        monkeypatch.setattr(dist, "get_rank", lambda group: 2)
        monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        # There is no such device here: its tensors are kept on the host, under its name.
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        to: Callable[..., Tensor] = Tensor.to

        def moved(values: Tensor, device: torch.device) -> Tensor:
            self.devices.append(device)
            return to(values, "cpu", copy=True)

        monkeypatch.setattr(Tensor, "to", moved)

    def all_reduce(self, values: Tensor, op: Any, group: Any) -> None:
        assert op is dist.ReduceOp.SUM
        values.mul_(3)


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("gloo", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("mpi", "cpu"),
        ("nccl", "cuda:1"),
        ("cuda:nccl", "cuda:1"),
    ],
)
def test_the_backend_says_on_which_device(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str
) -> None:
    fake = FakeDist(monkeypatch, backend)
    assert (Ranks().is_one, Ranks().rank, Ranks().size) == (False, 2, 3)
    assert Ranks().all_reduce(torch.ones(2)).tolist() == [3, 3]
    assert fake.devices == [torch.device(device)]


def test_another_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDist(monkeypatch, "xccl")
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.cuda)
    Ranks().all_reduce(torch.ones(1))
    assert fake.devices == [torch.device("xpu", 1)]


def test_a_device_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDist(monkeypatch, "nccl")
    given = torch.device("cpu")
    Ranks(device=given).all_reduce(torch.ones(1))
    assert fake.devices == [given]


def test_alone_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDist(monkeypatch, "gloo")
    ranks = Ranks(alone=True)
    assert (ranks.is_one, ranks.rank, ranks.size) == (True, 0, 1)


def test_a_collective_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CollectiveError, match=r"all-reduce of the channel sums failed \("):
        Ranks().all_reduce(torch.ones(1))  # no process group
