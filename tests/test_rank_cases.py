"""What tests get back from functions that run on real processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from rank_cases import TORCH, RanksOf, case


@case(TORCH, ranks=2)
def numbered(folder: Path) -> tuple[int, int, bool]:
    return dist.get_rank(), dist.get_world_size(), folder.exists()


@case(TORCH, ranks=2)
def fails_on_rank_one(folder: Path) -> int:
    if dist.get_rank() == 1:
        raise RuntimeError("rank one gives up")
    dist.barrier()
    return 0


@case(TORCH, ranks=1)
def alone(folder: Path) -> tuple[bool, str | None]:
    return dist.is_initialized(), os.environ.get("WORLD_SIZE")


def test_cases_return_what_each_rank_returned(ranks_of: RanksOf) -> None:
    assert ranks_of(numbered) == [(0, 2, False), (1, 2, False)]
    assert ranks_of(alone) == [(False, None)]


def test_the_rank_that_failed_is_reported(ranks_of: RanksOf, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank one gives up"):
        ranks_of(fails_on_rank_one)
    with pytest.raises(AssertionError, match=r"rank 0: (.|\n)*TypeError"):
        ranks_of.call(TORCH, os.path.join, 1, ranks=2, folder=tmp_path)


def test_a_call_has_arguments(ranks_of: RanksOf, tmp_path: Path) -> None:
    assert ranks_of.call(TORCH, pow, 2, 5, ranks=2, folder=tmp_path / "job") == [32, 32]
