"""Hypothesis strategies: micro-batches of every layout, as lists for the oracle and as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from hypothesis import strategies as st
from reference import IGNORED, Batch

from channel_metrics import ChannelLossAccumulator, ChannelTable
from channel_metrics.core.checks import token_values
from channel_metrics.core.schema import DEFAULT_METRICS
from channel_metrics.core.sums import TokenValues
from channel_metrics.core.text_sizes import TextSizes

NAMES = ("a", "b", "c")
# The text of the tokens: two characters of three bytes, and a special token.
TEXT = {0: "aß", 1: ""}
TEXT_SIZES = TextSizes(torch.tensor([3, 0]), torch.tensor([2, 0]))


@dataclass(frozen=True)
class Case:
    """A batch and how it is handed over: as tensors of `shape`, with or without its bounds."""

    batch: Batch
    shape: tuple[int, ...]
    pass_bounds: bool

    def in_dtype(self, dtype: torch.dtype) -> Case:
        """The case whose losses are what `dtype` makes of them."""
        losses = torch.tensor(self.batch.losses, dtype=torch.float64).to(dtype)
        return replace(self, batch=replace(self.batch, losses=losses.double().tolist()))

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """The arguments of `update`, with channels as names."""
        batch = self.batch
        given = {
            "token_losses": torch.tensor(batch.losses, dtype=dtype),
            "labels": _optional(batch.labels, torch.int64),
            "loss_mask": _optional(batch.loss_mask, torch.float32),
            "correct": _optional(batch.correct, torch.bool),
            "weights": _optional(batch.weights, torch.float32),
            "entropy": _optional(batch.entropy, torch.float64),
        }
        shaped = {k: v.view(self.shape) for k, v in given.items() if v is not None}
        bounds = torch.tensor(batch.bounds, dtype=torch.int32) if self.pass_bounds else None
        made: dict[str, Any] = {**shaped, "channels": list(batch.channels), "cu_seqlens": bounds}
        if batch.references:
            pairs = [pair or (math.nan, math.nan) for pair in batch.references]
            made["reference"] = torch.tensor(pairs, dtype=torch.float64)
        return made

    def values(self, dtype: torch.dtype = torch.float64) -> TokenValues:
        """The same, without channels and bounds."""
        given = self.tensors(dtype)
        names = ("token_losses", "labels", "loss_mask", "correct", "weights")
        args = cast(Any, [given.get(name) for name in names])
        return token_values(*args, entropy=given.get("entropy"))


def _optional(values: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=dtype)


def accumulate(
    cases: list[Case],
    table: ChannelTable | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> ChannelLossAccumulator:
    """All cases in one new accumulator, channels by name."""
    accumulator = ChannelLossAccumulator(NAMES if table is None else table, metrics=metrics)
    accumulator.text_sizes = TEXT_SIZES
    for case in cases:
        accumulator.update(**case.tensors())
    return accumulator


# Made once: hypothesis takes longer to make a strategy than to draw from it.
_LENGTHS = st.lists(st.integers(0, 4), max_size=4)
_CHANNEL = st.sampled_from([*NAMES, None])
_PAIR = st.tuples(st.floats(0, 400), st.integers(0, 4))
# float32 holds few digits of a subnormal number, so products with one are far off.
_FINITE = st.floats(0, 100, width=32, allow_subnormal=False)
_ODD = st.sampled_from([float("nan"), float("inf"), float("-inf")])
_VALUES: dict[tuple[str, bool], st.SearchStrategy[Any]] = {
    (key, finite): values
    for finite in (False, True)
    for key, values in {
        "losses": _FINITE
        if finite
        else st.integers(0, 7).flatmap(lambda i: _ODD if i == 0 else _FINITE),
        "labels": st.sampled_from([IGNORED, 0, 1]),
        "correct": st.booleans(),
        "weights": st.floats(0, 4, width=16) | st.just(4.0 if finite else float("nan")),
        "entropy": st.floats(0, 12) | st.just(12.0 if finite else float("nan")),
    }.items()
}


@cache
def _lists(key: str, size: int, finite: bool) -> st.SearchStrategy[list[Any]]:
    return st.lists(_VALUES[key, finite], min_size=size, max_size=size)


@cache
def _optional_lists(key: str, size: int, finite: bool) -> st.SearchStrategy[list[Any] | None]:
    return st.none() | _lists(key, size, finite)


@cache
def _references(size: int) -> st.SearchStrategy[list[Any]]:
    return st.just([]) | st.lists(st.none() | _PAIR, min_size=size, max_size=size)


@st.composite
def cases(draw: st.DrawFn, finite: bool = False) -> Case:
    """A padded batch (left or right), or a packed one with or without a tail past its bounds."""
    lengths = draw(_LENGTHS)
    channels = [draw(_CHANNEL) for _ in lengths]
    if draw(st.booleans()):
        size = max(lengths, default=0) + draw(st.integers(0, 1))
        left = draw(st.booleans())
        pads = [size - length for length in lengths]
        mask = [float(pad <= i if left else i < size - pad) for pad in pads for i in range(size)]
        losses = draw(_lists("losses", len(mask), finite))
        batch = Batch(losses, channels, _bounds([size] * len(lengths)), loss_mask=mask)
        case = Case(batch, (len(lengths), size), draw(st.booleans()))
    else:
        num_tokens = sum(lengths) + draw(st.integers(0, 2))
        batch = Batch(draw(_lists("losses", num_tokens, finite)), channels, _bounds(lengths))
        shape = (1, num_tokens) if draw(st.booleans()) else (num_tokens,)
        case = Case(batch, shape, True)
    num_tokens = len(case.batch.losses)
    drawn: dict[str, Any] = {
        key: draw(_optional_lists(key, num_tokens, finite))
        for key in ("labels", "correct", "weights", "entropy")
    }
    references = draw(_references(len(channels)))
    return replace(case, batch=replace(case.batch, text=TEXT, references=references, **drawn))


def _bounds(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]
