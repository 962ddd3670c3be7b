"""Boundaries of every form of batch, on tensors small enough to read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from boundary_tools import check, ints
from torch import Tensor

from channel_metrics.core.boundaries import (
    boundaries_from_attention_mask,
    boundaries_from_batch,
    boundaries_from_position_ids,
    boundaries_from_seq_idx,
    sequence_index,
    to_target_frame,
    token_channel_ids,
)

LOWEST = torch.finfo(torch.float32).min


def blocks(*rows: list[int], causal: bool) -> Tensor:
    """[B, 1, S, S] bool from the segment numbers of each row, 0 is padding."""
    numbers = torch.tensor(rows)
    same = (numbers[:, :, None] == numbers[:, None, :]) & (numbers[:, :, None] > 0)
    return (same.tril() if causal else same).unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("mask", "bounds", "keep", "unpadded"),
    [
        ([[1, 1, 1], [1, 1, 1]], [0, 3, 6], None, [0, 3, 6]),
        ([[1, 1, 0], [1, 0, 0]], [0, 3, 6], [1, 1, 0, 1, 0, 0], [0, 2, 3]),
        ([[0, 1, 1], [0, 0, 1]], [0, 3, 6], [0, 1, 1, 0, 0, 1], [0, 2, 3]),
        ([[0, 0], [1, 1]], [0, 2, 4], [0, 0, 1, 1], [0, 0, 2]),
        ([[1, 0, 1]], [0, 3], [1, 0, 1], [0, 2]),
        ([[0]], [0, 1], [0], [0, 0]),
        ([[1]], [0, 1], None, [0, 1]),
    ],
    ids=["full", "right", "left", "empty-row", "hole", "one-pad", "one-token"],
)
def test_mask_of_zeros_and_ones(
    mask: list[list[int]],
    bounds: list[int],
    keep: list[int] | None,
    unpadded: list[int],
    dtype: torch.dtype,
) -> None:
    found = boundaries_from_attention_mask(torch.tensor(mask, dtype=dtype))
    check(found, bounds, keep)
    assert found.unpadded_cu_seqlens().tolist() == unpadded
    assert found.unpadded_cu_seqlens().dtype == torch.int32


@pytest.mark.parametrize(
    ("numbers", "bounds", "keep"),
    [
        ([[1, 1, 2, 2, 2]], [0, 2, 5], None),
        ([[1, 2, 2, 0], [1, 1, 0, 0]], [0, 1, 4, 8], [1, 1, 1, 0, 1, 1, 0, 0]),
        ([[0, 0, 1, 2]], [0, 3, 4], [0, 0, 1, 1]),
        ([[1, 0, 1, 2]], [0, 3, 4], [1, 0, 1, 1]),
        ([[1, 0, 2, 2]], [0, 2, 4], [1, 0, 1, 1]),
        ([[2, 1], [3, 3]], [0, 1, 2, 4], None),
        ([[1, 2, 1]], [0, 1, 2, 3], None),
    ],
    ids=["plain", "right", "left", "hole-inside", "hole-between", "any-number", "number-again"],
)
def test_segment_numbers(numbers: list[list[int]], bounds: list[int], keep: Any) -> None:
    check(boundaries_from_attention_mask(torch.tensor(numbers)), bounds, keep)
    check(boundaries_from_seq_idx(torch.tensor(numbers) - 1), bounds, keep)
    as_4d = blocks(*numbers, causal=True)
    if numbers != [[1, 2, 1]]:  # there, equal numbers apart from each other are one 4-D block
        check(boundaries_from_attention_mask(as_4d), bounds, keep)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("additive", [LOWEST, float("-inf"), -1e4, None])
def test_block_diagonal_mask(causal: bool, additive: float | None) -> None:
    mask = blocks([1, 1, 2, 2, 0], [0, 0, 1, 1, 1], causal=causal)
    if additive is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, additive)
    found = boundaries_from_attention_mask(mask)
    check(found, [0, 2, 5, 10], [1, 1, 1, 1, 0, 0, 0, 1, 1, 1])
    assert found.unpadded_cu_seqlens().tolist() == [0, 2, 4, 7]


def test_block_diagonal_mask_whose_padding_attends_to_tokens() -> None:
    """Models build causal x key padding: there, right padding attends to what is before it."""
    keep = torch.tensor([[1, 1, 0]], dtype=torch.bool)
    mask = torch.ones(3, 3, dtype=torch.bool).tril() & keep[:, None, None, :]
    before = mask.clone()
    check(boundaries_from_attention_mask(mask), [0, 3], [1, 1, 0])
    assert torch.equal(mask, before)


@pytest.mark.parametrize(
    ("position_ids", "mask", "bounds", "keep"),
    [
        ([0, 1, 2, 0, 1], None, [0, 3, 5], None),
        ([[0, 1, 2, 0, 1]], None, [0, 3, 5], None),
        ([[0, 1], [0, 0]], None, [0, 2, 3, 4], None),
        ([[5, 6, 0, 1]], None, [0, 2, 4], None),
        ([[0, 0, 0, 1]], [[0, 0, 1, 1]], [0, 4], [0, 0, 1, 1]),
        ([[1, 1, 0, 1, 0]], [[0, 0, 1, 1, 1]], [0, 4, 5], [0, 0, 1, 1, 1]),
        ([[0, 1, 0, 0]], [[1, 1, 1, 0]], [0, 2, 4], [1, 1, 1, 0]),
        ([[0, 0], [0, 1]], [[0, 0], [1, 1]], [0, 2, 4], [0, 0, 1, 1]),
        # RoBERTa and others count from 2: DataCollatorWithFlattening(position_ids_start=2).
        ([[2, 3, 4, 2, 3]], None, [0, 3, 5], None),
        ([[2, 2, 3, 2]], None, [0, 1, 3, 4], None),
        ([[2, 2, 3, 0, 0]], None, [0, 1, 3, 4, 5], None),
        ([[1, 1, 2, 3, 2]], [[0, 1, 1, 1, 1]], [0, 4, 5], [0, 1, 1, 1, 1]),
        # Tokens of an image share a position, which is no restart.
        ([[0, 1, 1, 1, 2, 0, 1, 1]], None, [0, 5, 8], None),
    ],
    ids=[
        *["flat", "row", "rows", "no-zero", "left", "left-packed", "right-packed", "empty-row"],
        *["from-2", "from-2-short", "from-2-padded", "from-2-masked", "image"],
    ],
)
def test_position_ids(position_ids: Any, mask: Any, bounds: list[int], keep: Any) -> None:
    given = None if mask is None else torch.tensor(mask)
    check(boundaries_from_position_ids(torch.tensor(position_ids), given), bounds, keep)


FLAT = torch.zeros(1, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "bounds", "keep"),
    [
        ({"labels": FLAT}, [0, 5], None),
        ({"input_ids": FLAT.expand(2, 5)}, [0, 5, 10], None),
        ({"labels": FLAT[0]}, [0, 5], None),
        ({"labels": FLAT[0], "attention_mask": ints(1, 1, 2, 2, 0)}, [0, 2, 5], [1, 1, 1, 1, 0]),
        ({"attention_mask": ints([1, 1, 0])}, [0, 3], [1, 1, 0]),
        ({"labels": FLAT, "cu_seqlens": ints(0, 2, 4)}, [0, 2, 4], None),
        ({"labels": FLAT, "cu_seq_lens_q": ints([0, 2, 5])}, [0, 2, 5], None),
        ({"labels": FLAT, "seq_idx": ints([0, 0, 1, 1, -1])}, [0, 2, 5], [1, 1, 1, 1, 0]),
        ({"labels": FLAT, "position_ids": ints([0, 1, 2, 0, 1])}, [0, 3, 5], None),
        ({"labels": FLAT, "position_ids": ints(0, 1, 2, 0, 1)}, [0, 3, 5], None),
        (
            {"labels": FLAT, "position_ids": ints([0, 1, 2, 0, 0]), "cu_seqlens": ints(0, 5)},
            [0, 5],
            None,
        ),
        (
            {"labels": FLAT, "position_ids": FLAT, "attention_mask": ints([1, 1, 2, 2, 2])},
            [0, 2, 5],
            None,
        ),
        (
            {"labels": FLAT, "position_ids": FLAT.expand(3, 1, 5), "attention_mask": FLAT + 1},
            [0, 5],
            None,
        ),
        (
            {"labels": FLAT, "attention_mask": blocks([1, 1, 2, 2, 0], causal=True)},
            [0, 2, 5],
            [1, 1, 1, 1, 0],
        ),
        # Encoder and decoder: the mask is the encoder's, the labels are the decoder's.
        ({"labels": FLAT, "input_ids": FLAT[:, :2], "attention_mask": ints([1, 0])}, [0, 5], None),
        (
            {
                "labels": FLAT,
                "input_ids": FLAT,
                "decoder_input_ids": FLAT,
                "attention_mask": ints([1, 1, 0, 0, 0]),
            },
            [0, 5],
            None,
        ),
        ({"labels": FLAT[:, :0]}, [0, 0], None),
        ({"labels": FLAT[:0]}, [0], None),
    ],
)
def test_batch(batch: dict[str, Any], bounds: list[int], keep: list[int] | None) -> None:
    check(boundaries_from_batch(batch), bounds, keep)


def test_token_ids_follow_the_boundaries() -> None:
    bounds = ints(0, 2, 2, 5)
    assert sequence_index(bounds, 7).tolist() == [0, 0, 2, 2, 2, 3, 3]
    for dtype in (torch.int64, torch.int32):
        ids = token_channel_ids(torch.tensor([7, 8, -1], dtype=dtype), bounds, 7)
        assert ids.dtype == torch.int64
        assert ids.tolist() == [7, 7, -1, -1, -1, -1, -1]
    assert token_channel_ids(torch.tensor([], dtype=torch.int64), ints(0), 2).tolist() == [-1, -1]


def test_target_frame_moves_each_row() -> None:
    moved = to_target_frame(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert moved.tolist() == [[3, 1, 2], [6, 4, 5]]
    assert to_target_frame(torch.tensor([1, 2, 3])).tolist() == [3, 1, 2]


def test_masks_whose_bytes_are_neither_0_nor_1() -> None:
    """A uint8 that is viewed as bool."""
    odd = torch.tensor([[2, 255, 0]], dtype=torch.uint8).view(torch.bool)
    positions = torch.tensor([[0, 0, 1]])
    square = torch.tensor([[4, 0], [2, 255]], dtype=torch.uint8).view(torch.bool)
    check(boundaries_from_attention_mask(odd), [0, 3], [1, 1, 0])
    check(boundaries_from_batch({"labels": positions, "attention_mask": odd}), [0, 3], [1, 1, 0])
    check(boundaries_from_position_ids(positions, odd), [0, 1, 3], [1, 1, 0])
    check(boundaries_from_attention_mask(square.view(1, 1, 2, 2)), [0, 2])


def test_another_default_device() -> None:
    """What is made on the host stays there."""
    labels, mask = torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [1, 2, 2]])
    positions = torch.tensor([[0, 1, 0], [0, 1, 2]])
    blocks = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    torch.set_default_device("meta")
    try:
        check(boundaries_from_batch({"labels": labels}), [0, 3, 6])
        check(boundaries_from_attention_mask(mask), [0, 3, 4, 6], [1, 1, 0, 1, 1, 1])
        check(boundaries_from_attention_mask(blocks), [0, 3, 6])
        check(boundaries_from_position_ids(positions), [0, 2, 3, 6])
    finally:
        torch.set_default_device(None)
