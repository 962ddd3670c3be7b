"""Boundaries from Megatron's `PackedSeqParams`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from boundary_tools import check, ints
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams

from channel_metrics import BoundaryError
from channel_metrics.core.boundaries import (
    boundaries_from_batch,
    boundaries_from_packed_seq_params,
    boundaries_from_position_ids,
)


def packed(lengths: list[int] | None, padded: list[int] | None = None) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=None if lengths is None else ints(*lengths),
        cu_seqlens_q_padded=None if padded is None else ints(*padded),
    )


@pytest.mark.parametrize(
    ("lengths", "padded", "bounds", "keep"),
    [
        ([0, 2, 5], None, [0, 2, 5], None),
        (None, [0, 4, 6], [0, 4, 6], None),
        ([0, 4, 6], [0, 4, 6], [0, 4, 6], None),
        ([0, 3, 4], [0, 4, 6], [0, 4, 6], [1, 1, 1, 0, 1, 0]),
        ([0, 0, 2], [0, 2, 4], [0, 2, 4], [0, 0, 1, 1, 0, 0]),
        ([0], [0], [0], None),
    ],
    ids=["plain", "padded-only", "equal", "padded", "empty-sequence-and-tail", "nothing"],
)
def test_bounds(lengths: Any, padded: Any, bounds: list[int], keep: Any) -> None:
    found = boundaries_from_packed_seq_params(packed(lengths, padded), 6)
    check(found, bounds, keep)
    if keep is not None:
        assert found.unpadded_cu_seqlens().tolist() == lengths


def test_in_a_batch() -> None:
    labels = torch.zeros(1, 5, dtype=torch.int64)
    batch = {"labels": labels, "packed_seq_params": PackedSeqParams(cu_seqlens_q=ints(0, 1, 5))}
    check(boundaries_from_batch(batch), [0, 1, 5])


@pytest.mark.parametrize(
    ("params", "num_tokens", "message"),
    [
        (PackedSeqParams(), 3, "neither cu_seqlens_q nor cu_seqlens_q_padded"),
        (packed([0, 3, 4], [0, 2, 6]), 6, "[0, 3, 4] against [0, 2, 6]"),
        (packed([0, 3], [0, 4, 6]), 6, "[0, 3] against [0, 4, 6]"),
    ],
)
def test_what_is_refused(params: PackedSeqParams, num_tokens: int, message: str) -> None:
    with pytest.raises(BoundaryError, match=re.escape(message)):
        boundaries_from_packed_seq_params(params, num_tokens)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3))
def test_equal_those_of_position_ids(lengths: list[int], tail: int) -> None:
    positions = torch.tensor([[*(p for n in lengths for p in range(n)), *range(tail)]])
    mask = (torch.arange(positions.numel()) < sum(lengths)).long().unsqueeze(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    padded = bounds.clone()
    padded[-1] += tail
    found = boundaries_from_packed_seq_params(
        packed(bounds.tolist(), padded.tolist()), positions.numel()
    )
    other = boundaries_from_position_ids(positions, mask)
    assert found.cu_seqlens.tolist() == other.cu_seqlens.tolist() == padded.tolist()
    assert found.unpadded_cu_seqlens().tolist() == bounds.tolist()
    if tail:
        assert found.keep is not None and other.keep is not None
        assert found.keep.tolist() == other.keep.tolist() == mask[0].bool().tolist()
    else:
        assert found.keep is other.keep is None


def test_another_default_device() -> None:
    """What is made on the host stays there."""
    params = packed([0, 3], [0, 6])
    torch.set_default_device("meta")
    try:
        check(boundaries_from_packed_seq_params(params, 6), [0, 6], [1, 1, 1, 0, 0, 0])
    finally:
        torch.set_default_device(None)
