"""What one `ChannelLossAccumulator.update` costs, against one masked sum of the same tensor.

The masked sum is what a trainer does anyway to get its loss, and the least that any metric must
do. Peers are measured beside it, on the same packed tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers import Call, segment_reduction
from benchmarks.swift_peer import SwiftLoop, swift_megatron
from benchmarks.timing import compare, one_thread
from benchmarks.veomni_peer import VeOmni
from channel_metrics import ChannelLossAccumulator

__all__ = ["CASES", "Case", "Tokens", "growth", "make_tokens", "masked_sum", "run"]


@dataclass(frozen=True)
class Case:
    """The size of one micro-batch."""

    num_tokens: int
    num_sequences: int
    num_channels: int


@dataclass(frozen=True)
class Tokens:
    """The tensors of one micro-batch: [T], but bounds [N + 1] and ids [N]."""

    losses: Tensor
    mask: Tensor
    correct: Tensor
    bounds: Tensor
    ids: Tensor

    def unshifted_labels(self) -> Tensor:
        """[T], whose shift by one is supervised where `mask` is."""
        return torch.where(self.mask, 1, -100).roll(1)


CASES = (Case(65_536, 2_048, 64), Case(8_192, 256, 16))
GROWTH = (4, 64, 4_096, 100_000)


def make_tokens(case: Case) -> Tokens:
    """Packed sequences of uneven lengths, all tokens covered, four of five supervised."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randperm(case.num_tokens - 1, generator=generator)[: case.num_sequences - 1] + 1
    ends = torch.tensor([0, case.num_tokens])
    return Tokens(
        losses=torch.rand(case.num_tokens, generator=generator),
        mask=torch.rand(case.num_tokens, generator=generator) < 0.8,
        correct=torch.rand(case.num_tokens, generator=generator) < 0.5,
        bounds=torch.cat([inner, ends]).sort().values.to(torch.int32),
        ids=torch.randint(case.num_channels, (case.num_sequences,), generator=generator),
    )


def run(num_rounds: int = 100) -> list[dict[str, object]]:
    """All ways to do it, in both cases."""
    rows: list[dict[str, object]] = []
    for case in CASES:
        with one_thread():
            calls = _ours(case) | _peers(case)
            timings = compare(calls, num_rounds=num_rounds, num_calls=3, num_warmup=10)
        rows += [asdict(case) | asdict(timing) for timing in timings]
    return rows


def growth(num_rounds: int = 200) -> list[dict[str, object]]:
    """The same 65,536 tokens, in more and more channels."""
    calls: dict[str, Call] = {}
    for num_channels in GROWTH:
        tokens = make_tokens(Case(65_536, 2_048, num_channels))
        calls[str(num_channels)] = partial(
            _accumulator(num_channels).update,
            tokens.losses,
            channels=tokens.ids,
            cu_seqlens=tokens.bounds,
            loss_mask=tokens.mask,
        )
    with one_thread():
        timings = compare(calls, num_rounds=num_rounds, num_calls=3, num_warmup=10)
    return [{"num_channels": int(timing.variant)} | asdict(timing) for timing in timings]


def _ours(case: Case) -> dict[str, Call]:
    tokens = make_tokens(case)
    shape = (case.num_sequences, -1)
    accumulator = _accumulator(case.num_channels)
    packed = partial(
        accumulator.update,
        tokens.losses,
        channels=tokens.ids,
        cu_seqlens=tokens.bounds,
        loss_mask=tokens.mask,
    )
    padded = partial(
        accumulator.update,
        tokens.losses.view(shape),
        channels=tokens.ids,
        loss_mask=tokens.mask.view(shape),
    )
    per_token = tokens.ids.repeat_interleave(tokens.bounds.diff())
    return {
        "masked sum": partial(masked_sum, tokens),
        "update, padded": padded,
        "update, padded, accuracy": partial(padded, correct=tokens.correct.view(shape)),
        "update, packed": packed,
        "update, packed, accuracy": partial(packed, correct=tokens.correct),
        "update, ids per token": partial(
            accumulator.update, tokens.losses, channels=per_token, loss_mask=tokens.mask
        ),
        "plain segment reduction": segment_reduction(
            tokens.losses, tokens.mask, tokens.bounds, tokens.ids
        ),
    }


def _peers(case: Case) -> dict[str, Call]:
    tokens = make_tokens(case)
    names = [f"channel{i}" for i in tokens.ids.tolist()]
    veomni = VeOmni.of_packed(tokens.ids.tolist(), tokens.bounds)
    return {
        "ms-swift, Megatron": swift_megatron(tokens.losses, tokens.mask, tokens.bounds, names),
        "ms-swift, HF": partial(
            SwiftLoop(names, tokens.bounds).update, tokens.losses, tokens.unshifted_labels()
        ),
        "VeOmni": veomni.aggregation(tokens.losses, tokens.mask),
    }


def masked_sum(tokens: Tokens) -> Tensor:
    """What a trainer does anyway, and all variants are measured against."""
    return (tokens.losses * tokens.mask).sum()


def _accumulator(num_channels: int) -> ChannelLossAccumulator:
    return ChannelLossAccumulator([f"channel{i}" for i in range(num_channels)])
