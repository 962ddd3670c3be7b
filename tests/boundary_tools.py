"""What the tests of boundaries share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.boundaries import Boundaries

__all__ = ["check", "ints"]


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check(found: Boundaries, bounds: list[int], keep: list[int] | None = None) -> None:
    assert found.cu_seqlens.dtype == torch.int32
    assert found.cu_seqlens.tolist() == bounds
    assert found.num_sequences == len(bounds) - 1
    if keep is None:
        assert found.keep is None
    else:
        assert found.keep is not None
        assert found.keep.int().tolist() == keep
