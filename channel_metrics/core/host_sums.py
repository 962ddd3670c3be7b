"""Sums per sequence of finite values on the host, where an operator costs more than its tokens.

`cu_seqlens` [N + 1] is what a sparse matrix in CSR format calls its row pointers. With the mask of
a token as its column and its loss as its entry, the product of that matrix and the vector [0, 1]
is the sum of the supervised losses of each sequence: no pass to mask tokens, none to find their
sequences. Only a torch with MKL has this product.

Letters: T = num_tokens, N = num_sequences, K = columns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from channel_metrics.core.checks import Layout
from channel_metrics.core.sums import (
    COLUMNS,
    TokenValues,
    num_columns_of,
    token_sums,
    with_rest,
)

__all__ = ["finite_sequence_sums", "has_sparse_products", "sums_if_finite"]

_HOST = torch.device("cpu")
_TOKENS, _SAMPLES, _NLL = map(COLUMNS.index, ("tokens", "samples", "nll"))
_CORRECT, _JUDGED, _NONFINITE = map(COLUMNS.index, ("correct", "judged", "nonfinite"))
_WEIGHTED_NLL, _WEIGHT = map(COLUMNS.index, ("weighted_nll", "weight"))


def sums_if_finite(
    values: TokenValues, cu_seqlens: Tensor | None, layout: Layout | None, dtype: torch.dtype
) -> Tensor | None:
    """[K, N] sums, of tokens if there is no layout; None if a loss or a weight is not finite.

    None, too, if this torch has no faster way than that of a device.
    """
    if layout is None:
        sums = token_sums(values, dtype, finite=True)
    elif cu_seqlens is None or (has_sparse_products() and values.losses.numel() < 2**31):
        sums = finite_sequence_sums(values, cu_seqlens, layout, dtype)
    else:
        return None
    if not sums.numel():
        return sums
    # Neither bound is finite if one of the sums is NaN.
    lowest, highest = sums.aminmax()
    return sums if math.isfinite(highest.item() - lowest.item()) else None


def finite_sequence_sums(
    values: TokenValues,
    cu_seqlens: Tensor | None,
    layout: Layout,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What `sequence_sums` gives, if all losses and weights are finite; else it is not, either.

    K is `num_columns_of(values, finite=True)`. For tensors on the host, and bounds that have been
    checked, where `has_sparse_products`. If they cover all tokens, the result is [K, N].
    """
    if cu_seqlens is None:
        if values.losses.dim() == 1:
            values = values.map(partial(torch.unsqueeze, dim=0))
        num_sequences = values.losses.shape[0]
    else:
        if values.losses.dim() == 2:
            values = values.map(torch.flatten)
        if not layout.covered:
            cu_seqlens = with_rest(cu_seqlens, values)
        num_sequences = cu_seqlens.numel() - 1
    num_columns = num_columns_of(values, finite=True)
    sums = torch.ones((num_columns, num_sequences), dtype=dtype, device=_HOST)
    if not (layout.covered and layout.filled):
        sums[_SAMPLES] = _samples(values, cu_seqlens, layout)
    if num_columns > _NONFINITE:
        sums[_CORRECT : _NONFINITE + 1] = 0
    columns = sums.unbind()
    if cu_seqlens is None:
        _add_up_rows(columns, values, dtype)
    else:
        _multiply(columns, values, cu_seqlens, dtype)
    if values.correct is not None:
        columns[_JUDGED].copy_(columns[_TOKENS])
    return sums


def _samples(values: TokenValues, cu_seqlens: Tensor | None, layout: Layout) -> Tensor | bool:
    if cu_seqlens is None:
        return values.losses.numel() > 0
    samples = cu_seqlens.diff() > 0
    if not layout.covered:
        samples[-1] = False
    return samples


def _add_up_rows(columns: Sequence[Tensor], values: TokenValues, dtype: torch.dtype) -> None:
    """Every row of the values, [N, S], is one sequence."""
    # As 0 and 1 of one byte, masks are converted and multiplied several times faster.
    mask = values.mask.view(torch.uint8)
    losses = _detached(values.losses) * mask
    torch.sum(mask, -1, dtype=dtype, out=columns[_TOKENS])
    torch.sum(losses, -1, dtype=dtype, out=columns[_NLL])
    if values.correct is not None:
        correct = (values.correct & values.mask).view(torch.uint8)
        torch.sum(correct, -1, dtype=dtype, out=columns[_CORRECT])
    if values.weights is not None:
        weights = _detached(values.weights).to(dtype) * mask
        torch.sum(weights, -1, out=columns[_WEIGHT])
        torch.sum(weights * losses.to(dtype), -1, out=columns[_WEIGHTED_NLL])


def _multiply(
    columns: Sequence[Tensor], values: TokenValues, cu_seqlens: Tensor, dtype: torch.dtype
) -> None:
    """Sequences of the values, [T], lie between the bounds."""
    # A byte of the mask that is neither 0 nor 1 is supervised, too, and reads no foreign memory.
    picked, kinds = _picked(dtype), values.mask.to(torch.int32)
    entries = _detached(values.losses).to(dtype, copy=True)
    matrix = torch.sparse_csr_tensor(
        cu_seqlens.to(torch.int32).contiguous(),
        kinds,
        entries,
        size=(cu_seqlens.numel() - 1, 256),
        device=_HOST,
        check_invariants=False,  # a row has the same column more than once
    )
    torch.mv(matrix, picked, out=columns[_NLL])
    if values.weights is not None:
        weights = _detached(values.weights)
        torch.mul(weights.to(dtype), entries, out=entries)
        torch.mv(matrix, picked, out=columns[_WEIGHTED_NLL])
        entries.copy_(weights)
        torch.mv(matrix, picked, out=columns[_WEIGHT])
    entries.fill_(1)
    torch.mv(matrix, picked, out=columns[_TOKENS])
    if values.correct is not None:
        kinds.copy_(values.correct & values.mask)
        torch.mv(matrix, picked, out=columns[_CORRECT])


def _detached(values: Tensor) -> Tensor:
    return values.detach() if values.requires_grad else values


@cache
def _picked(dtype: torch.dtype) -> Tensor:
    """[256]: what each byte of a mask counts for."""
    with torch.inference_mode(False):
        return torch.arange(256, device=_HOST).gt(0).to(dtype)


@cache
def has_sparse_products() -> bool:
    """Whether this torch multiplies CSR matrices on the host, and sees what their parts become.

    That is tried, once in a process: a torch that copies the parts would be wrong in silence.
    """
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    with warnings.catch_warnings(), _HOST:
        # torch says, once in a process, that CSR matrices are in beta: here, to nobody.
        warnings.simplefilter("ignore")
        ones, bounds = torch.ones(3), torch.tensor([0, 3], dtype=torch.int32)
        mask, correct = torch.tensor([[True, True, False], [True, False, True]])
        tried = TokenValues(losses=ones * 2, mask=mask, correct=correct, weights=ones * 3)
        sums = finite_sequence_sums(tried, bounds, Layout(covered=True, filled=True))
    return sums.flatten().tolist() == [2, 1, 4, 1, 2, 0, 12, 6]
