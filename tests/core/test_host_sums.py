"""The sums of the host against those of a device, and whatever may be set around them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases
from torch import Tensor

from channel_metrics import ChannelLossAccumulator
from channel_metrics.core import host_sums
from channel_metrics.core.checks import Layout
from channel_metrics.core.host_sums import finite_sequence_sums, has_sparse_products, sums_if_finite
from channel_metrics.core.sums import TokenValues, sequence_sums

DTYPES = ((torch.float64, 1e-14), (torch.float32, 1e-5))


def layout_of(bounds: Tensor | None, num_tokens: int) -> Layout:
    if bounds is None:
        return Layout(covered=True, filled=num_tokens > 0)
    return Layout(int(bounds[-1]) == num_tokens, bool((bounds.diff() > 0).all()))


def packed() -> tuple[TokenValues, Tensor]:
    """Nine tokens in sequences of 2, 0, 4 and 3."""
    losses = torch.arange(1.0, 10.0)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1], dtype=torch.bool)
    correct = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    bounds = torch.tensor([0, 2, 2, 6, 9], dtype=torch.int32)
    return TokenValues(losses, mask, correct), bounds


PACKED = [[2, 0, 3, 1], [1, 0, 1, 1], [3, 0, 15, 9], [1, 0, 2, 1], [2, 0, 3, 1]]


@pytest.fixture(autouse=True, scope="module")
def _sparse_products() -> None:
    """Else what is tested here would not run."""
    assert has_sparse_products()


@given(cases(finite=True), st.booleans(), st.sampled_from([torch.int32, torch.int64]))
def test_the_host_adds_up_like_a_device(
    case: Case, by_rows: bool, bound_dtype: torch.dtype
) -> None:
    bounds = None if by_rows else torch.tensor(case.batch.bounds, dtype=bound_dtype)
    for losses_dtype in (torch.float64, torch.float32, torch.bfloat16):
        values = case.in_dtype(losses_dtype).values(losses_dtype)
        for dtype, rtol in DTYPES:
            careful = sequence_sums(values, bounds, dtype)
            layout = layout_of(bounds, values.losses.numel())
            plain = finite_sequence_sums(values, bounds, layout, dtype)
            assert not careful[len(plain) :].any()
            assert not careful[:, plain.shape[1] :].any()  # nothing past the last bound
            expected = careful[: len(plain), : plain.shape[1]]
            torch.testing.assert_close(plain, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_not_finite_is_seen(broken: float, supervised: bool, weighted: bool) -> None:
    values, bounds = packed()
    position = 4 if supervised else 2
    if weighted:
        weights = torch.ones(9)
        weights[position] = broken
        values = values._replace(weights=weights)
    else:
        values.losses[position] = broken
    assert sums_if_finite(values, bounds, Layout(True, False), torch.float64) is None
    rows = values.map(lambda tensor: tensor.view(3, 3))
    assert sums_if_finite(rows, None, Layout(True, True), torch.float64) is None


def test_without_sparse_products_the_host_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    values, bounds = packed()

    def compute() -> dict[str, float]:
        accumulator = ChannelLossAccumulator(["a", "b"])
        accumulator.update(
            values.losses,
            channels=["a", "b", "a", "b"],
            cu_seqlens=bounds,
            loss_mask=values.mask,
            correct=values.correct,
        )
        return accumulator.compute()

    expected = compute()
    monkeypatch.setattr(host_sums, "has_sparse_products", lambda: False)
    assert sums_if_finite(values, bounds, Layout(True, False), torch.float64) is None
    assert compute() == expected


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
    host_sums._picked.cache_clear()
    with around():
        sums = finite_sequence_sums(values, bounds, Layout(True, False), dtype)
    assert (sums.tolist(), sums.dtype) == (PACKED, dtype)
    assert not sums.requires_grad
    # What was kept in there is good outside.
    outside = finite_sequence_sums(values, bounds, Layout(True, False), dtype)
    assert outside.tolist() == PACKED


def test_a_torch_that_copies_parts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.sparse_csr_tensor

    def copy(*parts: Tensor, **options: object) -> Tensor:
        return make(*(part.clone() for part in parts), **options)

    monkeypatch.setattr(torch, "sparse_csr_tensor", copy)
    has_sparse_products.cache_clear()
    assert not has_sparse_products()
    monkeypatch.undo()
    has_sparse_products.cache_clear()
    assert has_sparse_products()


def test_strides() -> None:
    values, bounds = packed()
    apart = values.map(lambda tensor: torch.stack([tensor, tensor], 1)[:, 0])
    far_bounds = torch.stack([bounds, bounds], 1)[:, 0]
    assert finite_sequence_sums(apart, far_bounds, Layout(True, False)).tolist() == PACKED
    columns = values.map(lambda tensor: tensor.view(3, 3).t().contiguous().t())
    assert finite_sequence_sums(columns, bounds, Layout(True, False)).tolist() == PACKED


def test_any_byte_but_zero_is_supervised() -> None:
    values, bounds = packed()
    bytes_of_mask = values.mask.view(torch.uint8) * 255
    odd = values._replace(mask=bytes_of_mask.view(torch.bool), correct=None)
    sums = finite_sequence_sums(odd, bounds, Layout(True, False))
    assert sums.tolist() == PACKED[:3]


def test_nothing_given_is_changed() -> None:
    values, bounds = packed()
    values = values._replace(losses=values.losses.double(), weights=torch.ones(9).double() / 3)
    before = [tensor.clone() for tensor in (*values, bounds) if tensor is not None]
    finite_sequence_sums(values, bounds, Layout(True, False))
    after = [tensor for tensor in (*values, bounds) if tensor is not None]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_no_warning() -> None:
    """In a process of its own: torch says that CSR matrices are in beta once in each."""
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
