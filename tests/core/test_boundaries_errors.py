"""What boundaries refuse, word for word in the part that says what came; forms that agree."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from boundary_tools import ints
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics import BoundaryError
from channel_metrics.core.boundaries import (
    Boundaries,
    boundaries_from_attention_mask,
    boundaries_from_batch,
    boundaries_from_cu_seqlens,
    boundaries_from_position_ids,
    boundaries_from_seq_idx,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: boundaries_from_cu_seqlens(ints(1, 3), 3), "start at 0, but starts at 1"),
        (
            lambda: boundaries_from_cu_seqlens(ints(0, 3, 2), 5),
            "from 3 to 2 at entry 2; pass cumulative lengths",
        ),
        (
            lambda: boundaries_from_cu_seqlens(ints(0, 6), 5),
            "ends at 6, but the batch holds 5 tokens; take the boundaries from the same",
        ),
        (
            lambda: boundaries_from_cu_seqlens(torch.tensor([0.0, 1.0]), 1),
            "int32 or int64, but is torch.float32; convert it",
        ),
        (
            lambda: boundaries_from_cu_seqlens(ints([0, 1]), 1),
            "[num_sequences + 1], but has [1, 2]; pass one flat list",
        ),
        (lambda: boundaries_from_cu_seqlens(ints(), 0), "but has [0]"),
        (
            lambda: boundaries_from_attention_mask(torch.ones(2, 2, 2, dtype=torch.bool)),
            "has shape [2, 2, 2]; pass cu_seqlens",
        ),
        (
            lambda: boundaries_from_attention_mask(torch.ones(2, 2)),
            "must be bool or integer, but is torch.float32",
        ),
        (
            lambda: boundaries_from_attention_mask(ints([1, -5])),
            "0/1 or segment numbers, but holds -5",
        ),
        (
            lambda: boundaries_from_attention_mask(ints([1, -1])),
            "0/1 or segment numbers, but holds -1",
        ),
        (
            lambda: boundaries_from_batch({"labels": torch.ones(1, 4), "cu_seqlens": [0, 4]}),
            "cu_seqlens must be an int32 tensor, but is list; pass torch.tensor(cu_seqlens",
        ),
        (
            lambda: boundaries_from_attention_mask(ints([2, 1], [0, 0])),
            "row 1 of the segment numbers holds padding only",
        ),
        (
            lambda: boundaries_from_attention_mask(torch.ones(1, 2, 3, 3)),
            "must be [B, 1, S, S] to give boundaries, but has shape [1, 2, 3, 3]",
        ),
        (
            lambda: boundaries_from_attention_mask(torch.ones(1, 1, 2, 3)),
            "but has shape [1, 1, 2, 3]",
        ),
        (
            lambda: boundaries_from_attention_mask(
                torch.tensor([[[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]])
            ),
            "block-diagonal (causal or full inside each block)",
        ),
        (
            lambda: boundaries_from_attention_mask(torch.eye(2).view(1, 1, 2, 2)),
            "must be additive (0 where attention is allowed, negative elsewhere), but holds 1.0",
        ),
        (
            lambda: boundaries_from_position_ids(torch.zeros(3, 1, 4)),
            "but has shape [3, 1, 4]; pass cu_seqlens for multi-axis",
        ),
        (
            lambda: boundaries_from_position_ids(ints([0, 1]), ints([1, 1, 1])),
            "attention_mask has shape [1, 3] but position_ids has [1, 2]",
        ),
        (
            lambda: boundaries_from_seq_idx(torch.zeros(1, 4)),
            "integer tensor [B, S] or [num_tokens], but is torch.float32 of shape [1, 4]",
        ),
        (
            lambda: boundaries_from_batch({"pixels": torch.zeros(2, 3, 4)}),
            "but it holds {'pixels': [2, 3, 4]}; pass cu_seqlens",
        ),
        (lambda: boundaries_from_batch({"labels": [1, 2]}), "but it holds no tensors"),
        (
            lambda: boundaries_from_batch(
                {"labels": ints([1, 2, 3, 4]), "attention_mask": ints([1, 1, 1])}
            ),
            "covers 3 positions but the batch holds 4 tokens",
        ),
        (
            lambda: boundaries_from_batch({"labels": ints([1, 2]), "seq_idx": ints([0, 0, 1])}),
            "covers 3 positions but the batch holds 2 tokens",
        ),
    ],
)
def test_refuses(call: Callable[[], Boundaries], message: str) -> None:
    with pytest.raises(BoundaryError, match=re.escape(message)):
        call()


row_lengths = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@given(row_lengths, st.integers(0, 2), st.booleans())
def test_forms_of_a_padded_batch_agree(lengths: list[int], extra: int, left: bool) -> None:
    size = max(lengths) + extra
    rows = [[0] * (size - n) + [1] * n if left else [1] * n + [0] * (size - n) for n in lengths]
    mask = torch.tensor(rows, dtype=torch.int64).view(len(rows), size)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    causal = (mask[:, :, None] * mask[:, None, :]).bool().tril().unsqueeze(1)
    forms = [
        boundaries_from_attention_mask(mask),
        boundaries_from_position_ids(positions, mask),
        boundaries_from_attention_mask(causal),
        boundaries_from_batch(
            {"input_ids": mask, "position_ids": positions, "attention_mask": mask}
        ),
    ]
    if size and min(lengths) > 0:
        forms.append(boundaries_from_seq_idx(mask - 1))
    true_bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for found in forms:
        assert found.cu_seqlens.tolist() == [size * i for i in range(len(lengths) + 1)]
        assert found.unpadded_cu_seqlens().tolist() == true_bounds
        kept = torch.ones_like(mask.flatten()) if found.keep is None else found.keep
        assert kept.tolist() == mask.flatten().tolist()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3))
def test_forms_of_a_packed_row_agree(lengths: list[int], tail: int) -> None:
    numbers = torch.tensor([i + 1 for i, n in enumerate(lengths) for _ in range(n)] + [0] * tail)
    positions = torch.tensor([[*(p for n in lengths for p in range(n)), *range(tail)]])
    mask = (numbers > 0).long().unsqueeze(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    padded = bounds.clone()
    padded[-1] += tail
    same = (numbers[:, None] == numbers[None, :]) & (numbers > 0)[:, None]
    forms = [
        boundaries_from_seq_idx(numbers.unsqueeze(0) - 1),
        boundaries_from_position_ids(positions, mask),
        boundaries_from_attention_mask(same.view(1, 1, *same.shape)),
        boundaries_from_attention_mask(same.tril().view(1, 1, *same.shape)),
    ]
    if len(lengths) > 1:  # numbers that are all 1 are a plain mask
        forms.append(boundaries_from_attention_mask(numbers.unsqueeze(0)))
    for found in forms:
        assert found.cu_seqlens.tolist() == padded.tolist()
        assert found.unpadded_cu_seqlens().tolist() == bounds.tolist()
        assert (found.keep is None) == (tail == 0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_explicit_bounds_keep_empty_sequences(lengths: list[int]) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    labels = torch.zeros(1, int(bounds[-1]), dtype=torch.int64)
    for key in ("cu_seqlens", "cu_seq_lens_q"):
        assert boundaries_from_batch({"labels": labels, key: bounds}).cu_seqlens.equal(bounds.int())
