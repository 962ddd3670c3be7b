"""The pure sums: per sequence, per channel, per token id, in the causal frame."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import IGNORED, Batch, reference_sums
from strategies import Case, cases
from torch import Tensor

from channel_metrics.core.boundaries import token_channel_ids
from channel_metrics.core.sums import (
    COLUMNS,
    NUM_COLUMNS,
    TokenValues,
    group_sums,
    sequence_sums,
    token_sums,
)

SAMPLES = COLUMNS.index("samples")


def column(sums: Tensor, name: str) -> list[float]:
    return sums[COLUMNS.index(name)].tolist()


def test_sums_per_sequence() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0, float("nan"), 8.0, 16.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    correct = torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.bool)
    weights = torch.tensor([1.0, 0.5, 9.0, 9.0, 2.0, 3.0])
    bounds = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    sums = sequence_sums(TokenValues(losses, mask, correct, weights), bounds)
    assert (sums.dtype, sums.shape) == (torch.float64, (NUM_COLUMNS, 4))
    assert column(sums, "tokens") == [2, 0, 2, 1]  # the last row is past the last bound
    assert column(sums, "samples") == [1, 0, 1, 0]
    assert column(sums, "nll") == [3, 0, 8, 16]
    assert column(sums, "nonfinite") == [0, 0, 1, 0]
    assert column(sums, "correct") == [1, 0, 2, 0]
    assert column(sums, "judged") == [2, 0, 2, 1]
    assert column(sums, "weighted_nll") == [2, 0, 16, 48]
    assert column(sums, "weight") == [1.5, 0, 2, 3]


def test_ids_outside_the_table_are_unlabeled() -> None:
    sums = torch.arange(1.0, 6.0, dtype=torch.float64).view(1, 5)
    ids = torch.tensor([0, -1, 2, -7])  # a table of two channels: 2 is outside
    assert group_sums(sums, ids, 3).tolist() == [[2 + 3 + 4 + 5, 1, 0]]
    assert group_sums(sums, ids.int(), 3).tolist() == [[14, 1, 0]]


def test_two_groupings_share_the_sums_per_sequence() -> None:
    values = TokenValues(torch.ones(6), torch.ones(6, dtype=torch.bool))
    sums = sequence_sums(values, torch.tensor([0, 1, 3, 6]))
    by_channel = group_sums(sums, torch.tensor([0, 0, 1]), 3)
    by_language = group_sums(sums, torch.tensor([1, 0, 0]), 3)
    assert column(by_channel, "tokens") == [0, 3, 3]
    assert column(by_language, "tokens") == [0, 5, 1]


@given(cases())
def test_token_ids_say_the_same_as_boundaries(case: Case) -> None:
    bounds = torch.tensor(case.batch.bounds, dtype=torch.int32)
    ids = torch.tensor([-1 if c is None else "abc".index(c) for c in case.batch.channels]).long()
    values = case.values()
    by_bounds = group_sums(sequence_sums(values, bounds), ids, 4)
    token_ids = token_channel_ids(ids, bounds, len(case.batch.losses))
    by_token = group_sums(token_sums(values), token_ids, 4)
    assert by_token[SAMPLES].eq(0).all()
    by_token[SAMPLES] = by_bounds[SAMPLES]
    torch.testing.assert_close(by_token, by_bounds, rtol=1e-14, atol=0)


@given(cases(finite=True))
def test_finite_losses_need_no_care(case: Case) -> None:
    values = case.values()
    for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        careful, plain = token_sums(values, dtype), token_sums(values, dtype, finite=True)
        torch.testing.assert_close(plain, careful[: len(plain)], rtol=rtol, atol=0)
        assert not careful[len(plain) :].any()


@given(cases())
def test_rows_are_sequences(case: Case) -> None:
    if len(case.shape) == 1 or case.shape[0] != len(case.batch.channels):
        case = Case(case.batch, (1, len(case.batch.losses)), True)
    rows, size = case.shape
    bounds = torch.arange(rows + 1, dtype=torch.int32) * size
    by_bounds = sequence_sums(case.values(), bounds)
    assert not by_bounds[:, -1].any()  # nothing lies past the last bound
    by_rows = sequence_sums(case.values(), None)
    torch.testing.assert_close(by_rows, by_bounds[:, :-1], rtol=1e-14, atol=0)


@given(st.data(), st.integers(0, 4), st.integers(1, 6))
def test_causal_losses_count_for_the_token_they_predict(
    data: st.DataObject, num_rows: int, size: int
) -> None:
    """Packed rows, a bound anywhere: what the last position of a row says is about nothing."""
    num_tokens = num_rows * size

    def tokens(values: st.SearchStrategy[float]) -> list[float]:
        return data.draw(st.lists(values, min_size=num_tokens, max_size=num_tokens))

    inner = data.draw(st.sets(st.integers(0, num_tokens)))
    bounds = sorted({0, num_tokens, *inner, *range(0, num_tokens + 1, size)})
    labels = [int(label) for label in tokens(st.sampled_from([IGNORED, 5]))]
    correct = [bool(c) for c in tokens(st.booleans())]
    weights = tokens(st.floats(0, 4, width=16))
    losses = tokens(st.floats(0, 50, width=16))
    names = [f"{i}" for i in range(len(bounds) - 1)]
    batch = Batch(
        losses, names, bounds, labels, None, correct, weights, causal=True, row_length=size
    )
    expected = reference_sums([batch])

    shape = (num_rows, size)
    shifted = torch.nn.functional.pad(
        torch.tensor(labels).long().view(shape), (0, 1), value=IGNORED
    )[:, 1:]
    values = TokenValues(
        torch.tensor(losses).view(shape),
        shifted != IGNORED,
        torch.tensor(correct, dtype=torch.bool).view(shape),
        torch.tensor(weights).view(shape),
    )
    sums = sequence_sums(values.in_target_frame(), torch.tensor(bounds))
    found = [expected[name] for name in names]
    assert column(sums, "tokens") == [*(s.tokens for s in found), 0]
    assert column(sums, "correct") == [*(s.correct for s in found), 0]
    assert column(sums, "nll") == pytest.approx([*(sum(s.losses) for s in found), 0])
    assert column(sums, "weighted_nll") == pytest.approx([*(sum(s.weighted) for s in found), 0])


def test_frame_without_correct_and_weights() -> None:
    values = TokenValues(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)).in_target_frame()
    assert values.correct is None
    assert values.weights is None


def test_sums_do_not_carry_gradients() -> None:
    losses = torch.ones(2, requires_grad=True)
    weights = torch.ones(2, requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool)
    assert not sequence_sums(TokenValues(losses, mask, None, weights), None).requires_grad
