"""Head and loss alone, forward and backward: HF's default without metrics, and others with them."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step import HIDDEN, NUM_ROWS, ROW_LENGTH, VOCABULARY, peaks_of
from benchmarks.timing import compare
from benchmarks.veomni_peer import VeOmni
from channel_metrics import ChannelLossAccumulator
from channel_metrics.losses.linear import Backend, linear_cross_entropy

__all__ = ["peak_memory", "run"]

BACKENDS: dict[str, Backend] = {
    "logits, channels": "logits",
    "chunked, channels": "chunked",
    "torch chunked, channels": "torch",
}
DEFAULT, SECOND = "HF default, no metrics", "torch chunked, VeOmni's second projection"
VARIANTS = (DEFAULT, *BACKENDS, SECOND)


def run(max_seconds: float = 70) -> list[dict[str, object]]:
    """CPU time; the first variant is what the others are measured against."""
    calls = {name: partial(_step, name) for name in VARIANTS}
    timings = compare(
        calls, num_rounds=6, max_seconds=max_seconds, num_warmup=1, clock=time.process_time
    )
    return [asdict(timing) for timing in timings]


def peak_memory() -> list[dict[str, object]]:
    """What the tensors of head and loss hold at their peak, beside hidden states and weight."""
    return peaks_of({name: partial(_step, name) for name in VARIANTS})


@cache
def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_tokens = NUM_ROWS * ROW_LENGTH
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.02).requires_grad_()
    target = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    target[::5] = -100
    return hidden, weight, target


def _step(variant: str) -> None:
    hidden, weight, target = _tensors()
    _forward_and_backward(variant, hidden, weight, target)
    hidden.grad = weight.grad = None


def _forward_and_backward(variant: str, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    if variant == DEFAULT:
        # transformers' ForCausalLMLoss: logits, in float32, to the mean.
        F.cross_entropy(F.linear(hidden, weight).float(), target).backward()
        return
    if variant == SECOND:
        loss, _ = linear_cross_entropy(
            hidden, weight, target, reduction="mean", backend="torch", with_correct=False
        )
        loss.backward()
        positions = torch.arange(ROW_LENGTH).expand(NUM_ROWS, -1)
        VeOmni(list(range(NUM_ROWS)), positions).projected_again(hidden, weight, target)
        return
    loss, tokens = linear_cross_entropy(
        hidden, weight, target, reduction="mean", backend=BACKENDS[variant]
    )
    loss.backward()
    shape = (NUM_ROWS, ROW_LENGTH)
    assert tokens.correct is not None
    ChannelLossAccumulator(["bbu", "rru", "lvis", "lang_chat"]).update(
        tokens.nll.view(shape),
        channels=torch.arange(NUM_ROWS),
        labels=target.view(shape),
        correct=tokens.correct.view(shape),
    )
