"""The pure sums: per sequence, per row of a table, per token id, in the causal frame."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import IGNORED, Batch, reference_sums
from strategies import Case, cases
from torch import Tensor

from channel_metrics.core.boundaries import token_channel_ids
from channel_metrics.core.rows import table_rows
from channel_metrics.core.schema import TOKENS
from channel_metrics.core.sums import TokenValues, sequence_sums, token_sums

ALL = {column.name for column in TOKENS.columns if not column.optional}


def group_sums(sums: dict[str, Tensor], ids: Tensor, num_rows: int) -> dict[str, Tensor]:
    """{column: [num_rows]}; row 0 is what belongs to no id below num_rows - 1."""
    found = {}
    for name, values in sums.items():
        rows = table_rows(ids, num_rows, values.numel())
        found[name] = values.new_zeros(num_rows).index_add_(0, rows, values)
    return found


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float = 1e-14) -> None:
    assert list(left) == list(right)
    for name, values in left.items():
        torch.testing.assert_close(values, right[name], rtol=rtol, atol=0, msg=name)


def column(sums: dict[str, Tensor], name: str) -> list[float]:
    return sums[name].tolist()


def test_sums_per_sequence() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0, float("nan"), 8.0, 16.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    correct = torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.bool)
    weights = torch.tensor([1.0, 0.5, 9.0, 9.0, 2.0, 3.0])
    bounds = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    sums = sequence_sums(TokenValues(losses, mask, correct, weights), bounds)
    assert set(sums) == ALL
    assert {(values.dtype, values.shape) for values in sums.values()} == {(torch.float64, (4,))}
    assert column(sums, "tokens") == [2, 0, 2, 1]  # the last row is past the last bound
    assert column(sums, "samples") == [1, 0, 1, 0]
    assert column(sums, "nll") == [3, 0, 8, 16]
    assert column(sums, "nonfinite") == [0, 0, 1, 0]
    assert column(sums, "correct") == [1, 0, 2, 0]
    assert column(sums, "judged") == [2, 0, 2, 1]
    assert column(sums, "weighted_nll") == [2, 0, 16, 48]
    assert column(sums, "weight") == [1.5, 0, 2, 3]


def test_ids_outside_the_table_are_unlabeled() -> None:
    sums = {"nll": torch.arange(1.0, 6.0, dtype=torch.float64)}
    ids = torch.tensor([0, -1, 2, -7])  # a table of two channels: 2 is outside
    assert group_sums(sums, ids, 3)["nll"].tolist() == [2 + 3 + 4 + 5, 1, 0]
    assert group_sums(sums, ids.int(), 3)["nll"].tolist() == [14, 1, 0]


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
    # A shard of tokens does not know how many sequences it holds a part of.
    assert "samples" not in by_token and by_bounds.pop("samples").sum() <= len(ids)
    assert_close(by_token, by_bounds)


@given(cases(finite=True))
def test_float32_sums(case: Case) -> None:
    values = case.values()
    assert_close(
        {name: sums.double() for name, sums in token_sums(values, torch.float32).items()},
        token_sums(values),
        rtol=1e-5,
    )


@given(cases())
def test_rows_are_sequences(case: Case) -> None:
    if len(case.shape) == 1 or case.shape[0] != len(case.batch.channels):
        case = Case(case.batch, (1, len(case.batch.losses)), True)
    rows, size = case.shape
    bounds = torch.arange(rows + 1, dtype=torch.int32) * size
    by_bounds = sequence_sums(case.values(), bounds)
    # Nothing lies past the last bound.
    assert not any(sums[-1] for sums in by_bounds.values())
    by_rows = sequence_sums(case.values(), None)
    assert_close(by_rows, {name: sums[:-1] for name, sums in by_bounds.items()})


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
    sums = sequence_sums(TokenValues(losses, mask, None, weights), None)
    assert not any(values.requires_grad for values in sums.values())


def packed() -> tuple[TokenValues, Tensor]:
    """Nine tokens in sequences of 2, 0, 4 and 3."""
    losses = torch.arange(1.0, 10.0)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1], dtype=torch.bool)
    correct = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    bounds = torch.tensor([0, 2, 2, 6, 9], dtype=torch.int32)
    return TokenValues(losses, mask, correct), bounds


# tokens, samples, nll, correct, judged of `packed`.
PACKED = {
    "tokens": [2, 0, 3, 1],
    "samples": [1, 0, 1, 1],
    "nll": [3, 0, 15, 9],
    "correct": [1, 0, 2, 1],
    "judged": [2, 0, 3, 1],
}


def as_lists(sums: dict[str, Tensor]) -> dict[str, list[float]]:
    """Without what lies past the last bound, and without the columns that are all 0."""
    assert not any(values[-1] for values in sums.values())
    return {name: values[:-1].tolist() for name, values in sums.items() if values.any()}


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_not_finite_is_seen_where_it_counts(
    broken: float, supervised: bool, weighted: bool
) -> None:
    values, bounds = packed()
    position = 4 if supervised else 2
    if weighted:
        values = values._replace(weights=torch.ones(9))
    values.losses[position] = broken
    expected = dict(PACKED)
    if supervised:  # its loss was 5
        expected |= {"nll": [3, 0, 10, 9], "nonfinite": [0, 0, 1, 0]}
    if weighted:
        expected["weighted_nll"] = expected["nll"]
        expected["weight"] = [2, 0, 2, 1] if supervised else [2, 0, 3, 1]
    assert as_lists(sequence_sums(values, bounds)) == expected


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        lambda: torch.device("meta"),
        torch.sparse.check_sparse_tensor_invariants,
        deterministic,
    ],
    ids=["autocast", "inference", "default device", "invariants", "deterministic"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_set_around(
    around: Callable[[], AbstractContextManager[object]], dtype: torch.dtype
) -> None:
    values, bounds = packed()
    values.losses.requires_grad_()
    with around():
        sums = sequence_sums(values, bounds, dtype)
    assert as_lists(sums) == PACKED
    assert {(of.dtype, of.requires_grad) for of in sums.values()} == {(dtype, False)}
    # What was made in there does no harm outside.
    assert as_lists(sequence_sums(values, bounds, dtype)) == PACKED


def test_strides() -> None:
    values, bounds = packed()
    apart = values.map(lambda tensor: torch.stack([tensor, tensor], 1)[:, 0])
    far_bounds = torch.stack([bounds, bounds], 1)[:, 0]
    assert as_lists(sequence_sums(apart, far_bounds)) == PACKED
    columns = values.map(lambda tensor: tensor.view(3, 3).t().contiguous().t())
    assert as_lists(sequence_sums(columns, bounds)) == PACKED
    assert as_lists(sequence_sums(columns, bounds.long())) == PACKED


def test_any_byte_but_zero_is_supervised() -> None:
    values, bounds = packed()
    bytes_of_mask = values.mask.view(torch.uint8) * 255
    odd = values._replace(mask=bytes_of_mask.view(torch.bool), correct=None)
    expected = {name: PACKED[name] for name in ("tokens", "samples", "nll")}
    assert as_lists(sequence_sums(odd, bounds)) == expected


def test_nothing_given_is_changed() -> None:
    values, bounds = packed()
    values = values._replace(losses=values.losses.double(), weights=torch.ones(9).double() / 3)
    before = [tensor.clone() for tensor in (*values, bounds) if isinstance(tensor, torch.Tensor)]
    sequence_sums(values, bounds)
    token_sums(values)
    after = [tensor for tensor in (*values, bounds) if isinstance(tensor, torch.Tensor)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_no_warning() -> None:
    """In a process of its own: torch gives some warnings once in each."""
    program = (
        "import torch, channel_metrics\n"
        "accumulator = channel_metrics.ChannelLossAccumulator(['a'])\n"
        "bounds = torch.tensor([0, 2], dtype=torch.int32)\n"
        "accumulator.update(torch.ones(2), channels=['a'], cu_seqlens=bounds)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
